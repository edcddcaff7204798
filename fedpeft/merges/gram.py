"""Gram matrices of a round's updates: G_ij = ⟨update_i, update_j⟩, `(K, K)` float64 for K clients.

Lengths, distances and angles of updates are all in G, so a rule that reads G alone needs no update a second time.
Of raw tensors the inner product depends on how a low-rank product happens to be written: A → R A, B → B R⁻¹ changes
it and leaves the model as it was. `product_gram` compares the products, which no such change moves, across ranks
and without an array of shape (out, in): ⟨B_i A_i, B_j A_j⟩ = tr((B_i A_i)ᵀ B_j A_j) = ⟨B_iᵀ B_j, A_i A_jᵀ⟩.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from fedpeft.adapters import KINDS, Factors, ModuleSpec, Tensors, factors
from fedpeft.merges import products

_BLOCK = 1 << 16
"""How many numbers of each client are held as float64 at a time."""


def update_gram(modules: Sequence[ModuleSpec], received: Sequence[Tensors], deltas: Sequence[Tensors]) -> np.ndarray:
    """G of what the updates do: products on the low-rank `modules`, raw deltas on all other tensors.

    Client k received the adapter `received[k]` and moved it by `deltas[k]`, which may lack a tensor that does not
    move. Ranks may differ between clients; a module that a client did not receive is a change of 0.
    """
    inside = {f"{m.path}.{name}" for m in modules for name, _ in m.shapes if name not in KINDS[m.kind].beside}
    gram = flat_gram([{key: value for key, value in delta.items() if key not in inside} for delta in deltas])
    for module in modules:
        gram += product_gram([_change(module, before, delta) for before, delta in zip(received, deltas, strict=True)])
    return gram


def product_change(before: Factors, after: Factors) -> Factors:
    """B₁A₁ − B₀A₀ = (B₁ − B₀) A₁ + B₀ (A₁ − A₀), of twice the rank, or of the rank alone if one factor is frozen.

    This form rather than [B₁, −B₀] [A₁; A₀], which equals it: its terms are as small as the changes of the factors,
    so a small change of a large product loses no digits. Both are of one rank; no change is a product of rank 0.
    """
    moved = Factors(after.b - before.b, after.a), Factors(before.b, after.a - before.a)
    terms = [term for term in moved if term.b.any() and term.a.any()]
    return products.stack(terms) if terms else Factors(before.b[:, :0], before.a[:0])


def product_gram(updates: Sequence[Mapping[str, Factors]]) -> np.ndarray:
    """G of products in factored form, summed over modules by path; a module that a client lacks is a change of 0.

    Ranks may differ between clients. Memory is two arrays of (Σ rank)² numbers for one module at a time.
    """
    gram = np.zeros((len(updates), len(updates)))
    for path in sorted({path for update in updates for path in update}):
        present = [at for at, update in enumerate(updates) if path in update and update[path].rank]
        if present:
            gram[np.ix_(present, present)] += _module_gram([updates[at][path] for at in present])
    return gram


def flat_gram(deltas: Sequence[Tensors]) -> np.ndarray:
    """G of raw tensors, summed over keys; a tensor that a client lacks is a change of 0.

    Clients that have a tensor have it in one shape. Memory is a block of each client's numbers, not K models.
    """
    gram = np.zeros((len(deltas), len(deltas)))
    for key in sorted({key for delta in deltas for key in delta}):
        present = [at for at, delta in enumerate(deltas) if key in delta]
        flat = [deltas[at][key].reshape(-1) for at in present]
        for start in range(0, flat[0].size, _BLOCK):
            rows = np.stack([values[start : start + _BLOCK] for values in flat]).astype(np.float64)
            gram[np.ix_(present, present)] += rows @ rows.T
    return gram


def _change(module: ModuleSpec, before: Tensors, delta: Tensors) -> dict[str, Factors]:
    if not all(key in before for key in _keys(module)):
        return {}
    return {module.path: product_change(factors(module, before), factors(module, before, delta))}


def _keys(module: ModuleSpec) -> list[str]:
    return [f"{module.path}.{name}" for name, _ in module.shapes]


def _module_gram(changes: Sequence[Factors]) -> np.ndarray:
    """G of one module: all ranks of all clients against each other, then summed over each pair of clients."""
    orthonormal = [_with_orthonormal_a(change) for change in changes]
    whole = products.stack(orthonormal)
    pairs: np.ndarray = whole.b.T @ whole.b
    pairs *= whole.a @ whole.a.T
    starts = np.cumsum([0, *(change.rank for change in orthonormal[:-1])])
    sums: np.ndarray = np.add.reduceat(np.add.reduceat(pairs, starts, axis=0), starts, axis=1)
    gram: np.ndarray = (sums + sums.T) / 2
    return gram


def _with_orthonormal_a(change: Factors) -> Factors:
    """The same product with orthonormal rows in A, and of a rank of at most `in`.

    Without this, a client whose terms are vast and cancel could drown the length of its update in rounding, and an
    update of no length is near to all others. Cancelled in B first, the loss is of the terms, not of their squares.
    """
    q, r = np.linalg.qr(change.a.T)
    return Factors(change.b @ r.T, q.T)
