"""How far a merge is from the exact mean of what the clients' low-rank adapters do.

For each low-rank module the target is T = Σ p_k B_k A_k, with the scale folded into B_k. T is kept as stacked
factors; past the rank at which a matrix is smaller it becomes one, so memory does not grow with the number of
clients.

Source: the stack is that of Wang et al. 2024, "FLoRA", eq. 6; that the mean of factors is not the mean of products is
Sun et al. 2024, "Improving LoRA in Privacy-preserving Federated Learning", section 3.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
from scipy.linalg import blas

from fedpeft.adapters import AdapterSpec, Factors, ModuleSpec, Tensors, factors, low_rank_modules
from fedpeft.merges import products

_CHUNK_RANK = 512
"""Columns that wait before they are added to a matrix."""

_CHUNK_PARTS = 16
"""Products that are added to a matrix at once."""

_SQUARES_HOLD = 1e-6
"""Relative errors below this are lost when norms come from squares (float64)."""


@dataclass(frozen=True)
class Sum:
    """Σ w_k B_k A_k of one module: the parts that came, after those that were already added up."""

    parts: tuple[Factors, ...] = ()
    rank: int = 0
    whole: np.ndarray | None = None

    def plus(self, part: Factors) -> Sum:
        """The sum with one more product."""
        parts, rank = (*self.parts, part), self.rank + part.rank
        limit = min(part.shape) if self.whole is None else _CHUNK_RANK
        if rank <= limit:
            return replace(self, parts=parts, rank=rank)
        return Sum(whole=_added(self.whole, parts))

    def product(self, by: float = 1.0) -> Factors:
        """The sum times a number, in factored form; of a matrix, the factor on its smaller side is the identity."""
        if self.whole is None:
            stacked = products.stack(self.parts)
            np.multiply(stacked.b, by, out=stacked.b)
            return stacked
        whole = _added(self.whole, self.parts)
        np.multiply(whole, by, out=whole)
        outputs, inputs = whole.shape
        return Factors(_identity(outputs), whole) if outputs < inputs else Factors(whole, _identity(inputs))


@dataclass(frozen=True)
class Target:
    """Σ w_k B_k A_k of each module by path, and Σ w_k of the clients that have the module (`weights`) and of all.

    `lacks` are Σ w_k times what is known to be missing from a client's product, in norms, where anything is.
    """

    weight: float
    sums: Mapping[str, Sum]
    weights: Mapping[str, float]
    lacks: Mapping[str, float] = field(default_factory=dict)


class Report(NamedTuple):
    """Figures of one round, in all and by module.

    `errors` are ‖applied − T‖_F / ‖T‖_F (NaN where T is 0), `effective_ranks` those of T by participation ratio,
    `tails` the part of T's norm, from 0 to 1, that no adapter of the server's rank can hold. `lacks` is the part of it
    that was not in what came.
    """

    error: float
    errors: Mapping[str, float]
    effective_ranks: Mapping[str, float]
    tail: float
    tails: Mapping[str, float]
    lacks: float = 0.0


def measured_modules(spec: AdapterSpec, hidden: Collection[str]) -> tuple[ModuleSpec, ...]:
    """The low-rank modules of which the server sees every tensor; `hidden` ones stay with their clients."""
    return tuple(
        module
        for module in low_rank_modules(spec)
        if not {f"{module.path}.{name}" for name, _ in module.shapes} & set(hidden)
    )


def held(modules: tuple[ModuleSpec, ...], received: Tensors) -> tuple[ModuleSpec, ...]:
    """Those of `modules` that a client has, which received `received`."""
    return tuple(m for m in modules if all(f"{m.path}.{name}" in received for name, _ in m.shapes))


def begin() -> Target:
    """The target of no clients."""
    return Target(0.0, {}, {})


def add(
    target: Target,
    modules: tuple[ModuleSpec, ...],
    received: Tensors,
    delta: Tensors,
    weight: float,
    lacks: Mapping[str, float] | None = None,
) -> Target:
    """The target with one more client, which received an adapter and moved it by `delta`; `lacks` as in `Update`."""
    sums, weights = dict(target.sums), dict(target.weights)
    missed = {path: target.lacks.get(path, 0.0) + weight * size for path, size in (lacks or {}).items()}
    for module in modules:
        product = products.scaled(factors(module, received, delta), weight)
        sums[module.path] = sums.get(module.path, Sum()).plus(product)
        weights[module.path] = weights.get(module.path, 0.0) + weight
    return Target(target.weight + weight, sums, weights, {**target.lacks, **missed})


def means(target: Target, missing: str = "zero") -> dict[str, Factors]:
    """T of each module: the sum over all clients' weight, or ("covered") over that of those that have the module."""
    found = {}
    for path, total in target.sums.items():
        weight = target.weight if missing == "zero" else target.weights[path]
        found[path] = total.product(1.0 / weight)
    return found


def lacking(target: Target) -> dict[str, float]:
    """At most how much of T is not in `means(target)`, by module path, in norms, where anything is."""
    return {path: size / target.weight for path, size in target.lacks.items()}


def report(
    exact: Mapping[str, Factors],
    applied: Mapping[str, Factors],
    spectra: Mapping[str, products.Spectrum],
    lacks: Mapping[str, float] | None = None,
) -> Report:
    """Figures of what was applied against the exact mean, whose `spectra` are known; all by module.

    What is known to be missing from `exact` (`lacks`) is counted as missed, at a right angle to all that is there.
    """
    missing = lacks or {}
    errors, effective, tails = {}, {}, {}
    missed = wanted = lost = 0.0
    for path, mean in exact.items():
        size, dropped, effective[path] = spectra[path]
        gap = _distance(applied[path], mean, size)
        gap, size, dropped = (math.hypot(part, missing.get(path, 0.0)) for part in (gap, size, dropped))
        errors[path] = gap / size if size else math.nan
        tails[path] = dropped / size if size else math.nan
        missed, wanted, lost = missed + gap**2, wanted + size**2, lost + dropped**2
    unknown = sum(size**2 for size in missing.values())
    overall, tail, lacked = (math.sqrt(part / wanted) if wanted else math.nan for part in (missed, lost, unknown))
    return Report(overall, errors, effective, tail, tails, lacked)


def _distance(applied: Factors, exact: Factors, size: float) -> float:
    """‖applied − exact‖_F, from squares where they hold enough digits."""
    square = products.inner(applied, applied) - 2 * products.inner(applied, exact) + size**2
    if square > (_SQUARES_HOLD * size) ** 2:
        return math.sqrt(square)
    return products.frobenius(products.difference(applied, exact))


def _added(whole: np.ndarray | None, parts: tuple[Factors, ...]) -> np.ndarray:
    """A new matrix: `whole` and the products of `parts`, a few at a time, added in place by BLAS."""
    total = np.zeros(parts[0].shape) if whole is None else whole.copy()
    for start in range(0, len(parts), _CHUNK_PARTS):
        chunk = products.stack(parts[start : start + _CHUNK_PARTS])
        total = blas.dgemm(1.0, chunk.a.T, chunk.b.T, 1.0, total.T, overwrite_c=1).T
    return total


def _identity(size: int) -> np.ndarray:
    """The identity, read-only, as a view of few numbers: written out it is as great as the matrix beside it."""
    band = np.zeros(2 * size - 1)
    band[size - 1] = 1.0
    return np.lib.stride_tricks.sliding_window_view(band, size)[::-1]
