"""The residual beside the base: grown round by round in factored form, under a budget, and sent column by column.

Keys are `path.A` `(rank, in)` and `path.B` `(out, rank)`, float32, for each LoRA module. Tuples of ranks are in
order of path.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from fedpeft.adapters import RANK_AXES, AdapterSpec, AdapterState, Factors, Tensors, at_ranks, low_rank_modules
from fedpeft.merges import products
from fedpeft.updates import Drift

Ranks = tuple[int, ...]


class Grown(NamedTuple):
    """An adapter whose residual has grown, how it came about, and the norm of what the budget left out."""

    adapter: AdapterState
    drift: Drift
    dropped: float


def specification(spec: AdapterSpec, ranks: Ranks) -> AdapterSpec:
    """What a residual of these ranks looks like beside an adapter of `spec`; no ranks at all mean 0 everywhere."""
    modules = sorted((m for m in low_rank_modules(spec) if m.kind == "lora"), key=lambda module: module.path)
    wanted = ranks or (0,) * len(modules)
    only = spec.only(f"{module.path}.{name}" for module in modules for name in RANK_AXES["lora"])
    return at_ranks(only, {module.path: rank for module, rank in zip(modules, wanted, strict=True)})


def ranks_of(residual: Tensors) -> Ranks:
    """The residual's ranks; none of a residual that there is not."""
    return tuple(residual[f"{path}.A"].shape[0] for path in _paths(residual))


def _paths(residual: Tensors) -> list[str]:
    return sorted(key.removesuffix(".A") for key in residual if key.endswith(".A"))


def grow(adapter: AdapterState, drift: Drift, round_: int, more: Mapping[str, Factors], budget: int) -> Grown:
    """The adapter with `more` added to its residual in round `round_`.

    A module whose rank would pass `budget` (0: the smaller side of the weight, at which nothing is lost) is
    compressed to it; then a new epoch begins, because all of its columns change.
    """
    residual, squares, rewritten = dict(adapter.residual), 0.0, False
    for path, addition in more.items():
        parts = [Factors(residual[f"{path}.B"], residual[f"{path}.A"])] if f"{path}.A" in residual else []
        whole = products.stack([*parts, addition])
        cap = min(budget or whole.rank, *whole.shape)
        if whole.rank > cap:
            nearest = products.truncate(products.widened(whole), cap)
            whole, rewritten = nearest.factors, True
            squares += nearest.spectrum.dropped**2
        with np.errstate(over="ignore"):
            residual |= {f"{path}.B": whole.b.astype(np.float32), f"{path}.A": whole.a.astype(np.float32)}
    begun = Drift(epoch=round_) if rewritten else drift
    ranks = {**begun.ranks, round_: ranks_of(residual)}
    return Grown(replace(adapter, residual=residual), replace(begun, ranks=ranks), squares**0.5)


def forget(drift: Drift, rounds: Collection[int]) -> Drift:
    """The drift without the ranks after rounds that no node is at."""
    return replace(drift, ranks={round_: ranks for round_, ranks in drift.ranks.items() if round_ in rounds})


def after(residual: Tensors, start: Ranks) -> dict[str, np.ndarray]:
    """The columns of the residual from `start` on."""
    return _cut(residual, start, slice_from=True)


def joined(held: Tensors, start: Ranks, more: Tensors) -> dict[str, np.ndarray]:
    """The first `start` columns of what is held, then those that are new."""
    first = _cut(held, start, slice_from=False) if any(start) else {}
    return {
        key: np.concatenate([first[key], value], axis=_axis(key)) if key in first else value
        for key, value in more.items()
    }


def _cut(residual: Tensors, at: Ranks, *, slice_from: bool) -> dict[str, np.ndarray]:
    paths = _paths(residual)
    if not any(at):
        return dict(residual) if slice_from else {}
    found = {}
    for path, rank in zip(paths, at, strict=True):
        kept = slice(rank, None) if slice_from else slice(rank)
        found[f"{path}.A"] = residual[f"{path}.A"][kept]
        found[f"{path}.B"] = residual[f"{path}.B"][:, kept]
    return found


def _axis(key: str) -> int:
    return RANK_AXES["lora"][key.rpartition(".")[2]][0]
