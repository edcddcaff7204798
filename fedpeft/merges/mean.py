"""The weighted mean of deltas.

Δ = Σ p_k Δ_k with p_k = w_k / Σ w. On factors of low-rank adapters this is not the mean of what the adapters
do; on tensors that act linearly (scales, prompts, heads, one factor with the other frozen) it is.

Source: McMahan et al. 2017, "Communication-Efficient Learning of Deep Networks from Decentralized Data",
algorithm 1, on deltas instead of parameters.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from fedpeft.adapters import AdapterSpec, norm
from fedpeft.errors import FederationError
from fedpeft.merges.merge import WEIGHTS, Merge, Merged
from fedpeft.updates import Update


class _Sum(NamedTuple):
    """Float64 sums: of weights, of weighted deltas, of weighted squared norms."""

    weight: float
    deltas: dict[str, np.ndarray]
    squares: float


def mean(weights: str) -> Merge:
    """The merge that averages deltas, weighing each by the rule named `weights`.

    Its measures are `drift`: the weighted root mean square distance of the clients' deltas from their mean,
    over the norm of the mean (NaN where that is zero).
    """
    weigh = WEIGHTS[weights]

    def init(spec: AdapterSpec) -> _Sum:
        return _Sum(0.0, {key: np.zeros(shape) for key, shape in spec.shapes.items()}, 0.0)

    def add(state: _Sum, update: Update) -> _Sum:
        weight = weigh(update)
        deltas = {key: total + weight * update.delta[key].astype(np.float64) for key, total in state.deltas.items()}
        return _Sum(state.weight + weight, deltas, state.squares + weight * norm(update.delta) ** 2)

    def finish(state: _Sum) -> Merged:
        if state.weight <= 0:
            raise FederationError("merge: expected at least one update of positive weight, found none; check quorum.")
        delta = {key: (total / state.weight).astype(np.float32) for key, total in state.deltas.items()}
        size = norm(delta)
        variance = max(0.0, state.squares / state.weight - size**2)
        return Merged(delta, {"drift": math.sqrt(variance) / size if size else math.nan})

    return Merge(init, add, finish, weigh, reads="sum", linear=True)
