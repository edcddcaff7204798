"""How far a merge is from the exact mean of what the clients' low-rank adapters do.

For each LoRA module the target is T = Σ p_k B_k A_k, with the scale folded into B_k; the error of factors B, A is
‖B A − T‖_F / ‖T‖_F. T is kept as stacked factors: nothing of shape (out, in) is formed while the stack's rank is
below both, and past that the stack is folded without loss, so memory does not grow with the number of clients.

Source: the stack is that of Wang et al. 2024, "FLoRA", eq. 6; that the mean of factors is not the mean of products is
Sun et al. 2024, "Improving LoRA in Privacy-preserving Federated Learning", section 3.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import NamedTuple

import numpy as np

from fedpeft.adapters import AdapterSpec, Tensors


class Factors(NamedTuple):
    """A product in factored form, float64: B `(out, rank)` and A `(rank, in)`."""

    b: np.ndarray
    a: np.ndarray


class Target(NamedTuple):
    """Σ w_k B_k A_k of each module by path, and Σ w_k."""

    weight: float
    sums: Mapping[str, Factors]


class Errors(NamedTuple):
    """Relative errors: of all modules together, and of each by path; NaN where T is 0."""

    overall: float
    by_module: Mapping[str, float]


def measured_modules(spec: AdapterSpec, hidden: Collection[str]) -> tuple[str, ...]:
    """Paths of the LoRA modules of which the server sees both factors; `hidden` tensors stay with their clients."""
    seen = (module.path for module in spec.modules if module.kind == "lora")
    return tuple(path for path in seen if not {f"{path}.A", f"{path}.B"} & set(hidden))


def begin() -> Target:
    """The target of no clients."""
    return Target(0.0, {})


def add(target: Target, modules: tuple[str, ...], received: Tensors, delta: Tensors, weight: float) -> Target:
    """The target with one more client, which received an adapter and moved it by `delta`."""
    sums = {}
    for path in modules:
        b, a = _factors(path, received, delta)
        own = Factors(weight * b, a)
        sums[path] = folded(stack(target.sums[path], own)) if path in target.sums else own
    return Target(target.weight + weight, sums)


def errors(target: Target, received: Tensors, delta: Tensors) -> Errors:
    """How far from the target the adapter is that was received and then moved by `delta`."""
    found, missed, wanted = {}, 0.0, 0.0
    for path, total in target.sums.items():
        exact = Factors(total.b / target.weight, total.a)
        applied = _factors(path, received, delta)
        gap, size = frobenius(stack(applied, Factors(-exact.b, exact.a))), frobenius(exact)
        found[path] = gap / size if size else math.nan
        missed, wanted = missed + gap**2, wanted + size**2
    return Errors(math.sqrt(missed / wanted) if wanted else math.nan, found)


def stack(one: Factors, other: Factors) -> Factors:
    """Factors of the sum of two products; ranks add up."""
    return Factors(np.concatenate([one.b, other.b], axis=1), np.concatenate([one.a, other.a], axis=0))


def folded(product: Factors) -> Factors:
    """The same product at a rank of at most min(out, in)."""
    outputs, rank = product.b.shape
    inputs = product.a.shape[1]
    if rank <= min(outputs, inputs):
        return product
    if inputs <= outputs:
        q, r = np.linalg.qr(product.a)
        return Factors(product.b @ q, r)
    q, r = np.linalg.qr(product.b.T)
    return Factors(r.T, q.T @ product.a)


def frobenius(product: Factors) -> float:
    """‖B A‖_F, from the triangular factors alone."""
    left: np.ndarray = np.linalg.qr(product.b)[1]
    right: np.ndarray = np.linalg.qr(product.a.T)[1]
    return float(np.linalg.norm(left @ right.T))


def _factors(path: str, received: Tensors, delta: Tensors) -> Factors:
    """A module's factors after `delta`, which may lack a tensor that does not move."""
    wide = (np.add(received[key], delta.get(key, 0), dtype=np.float64) for key in (f"{path}.B", f"{path}.A"))
    return Factors(*wide)
