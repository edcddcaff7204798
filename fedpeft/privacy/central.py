"""Central differential privacy: the server sees updates, and nobody else sees more than their clipped, noisy mean.

The mean is Σ clip(Δ_k) / m plus Gaussian noise of standard deviation z C / m, with m the planned cohort: clients that
were drawn and did not come count as zero, and m does not follow them.

Source: McMahan et al. 2018, "Learning Differentially Private Recurrent Language Models", algorithm 1, with the fixed
denominator of section 3.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from fedpeft.adapters import Tensors, fit, norm
from fedpeft.merges import Contribution, Merge, Merged
from fedpeft.privacy import bands
from fedpeft.privacy.clipping import Adaptive, count_noise, moved, update_noise
from fedpeft.privacy.entropy import SOURCES, normal_like
from fedpeft.privacy.geometry import AS_IT_IS, Sides, geometry
from fedpeft.updates import ServerState


@dataclass(frozen=True)
class Central:
    """The settings of the mechanism.

    `clip_norm` is C, in the product's geometry (see `fedpeft.privacy.geometry`), at first where it is `adaptive`.
    `noise_multiplier` is z: what all that is released of a round costs is that of one Gaussian with this z. `cohort`
    is m. `coefficients` are those of banded noise ((1,): noise of its own for each round).
    """

    clip_norm: float
    noise_multiplier: float
    cohort: int
    adaptive: Adaptive | None = None
    coefficients: tuple[float, ...] = (1.0,)
    entropy: str = "os"


class _Fold(NamedTuple):
    """A round so far: coordinates by tensor, the sum of clipped updates in them, and half of (short − long)."""

    state: ServerState
    clip: float
    sides: dict[str, Sides]
    sums: dict[str, np.ndarray]
    halves: float


def private(merge: Merge, central: Central) -> Merge:
    """`merge`, a plain mean, under central differential privacy."""

    def init(state: ServerState, keys: Collection[str], hidden: Collection[str]) -> _Fold:  # noqa: ARG001
        spec, tensors = state.adapter.spec, state.adapter.tensors
        sums = {key: np.zeros(spec.shapes[key]) for key in sorted(keys)}
        return _Fold(state, state.privacy.clip_norm or central.clip_norm, geometry(spec, tensors, sums), sums, 0.0)

    def add(fold: _Fold, contribution: Contribution) -> _Fold:
        padded = {key: fit(value, fold.sums[key].shape) for key, value in contribution.update.delta.items()}
        there, size = clipped(padded, fold.sides, fold.clip)
        sums = {key: total + there.get(key, 0.0) for key, total in fold.sums.items()}
        return fold._replace(sums=sums, halves=fold.halves + (0.5 if size <= fold.clip else -0.5))

    def finish(fold: _Fold) -> Merged:
        state, privacy = fold.state, fold.state.privacy
        draw = SOURCES[central.entropy](state.seed, state.round + 1, "noise")
        on_count = count_noise(central.adaptive, central.noise_multiplier, central.cohort) if central.adaptive else 0.0
        own = update_noise(central.noise_multiplier, on_count) if central.adaptive else central.noise_multiplier
        deviation = own * fold.clip * bands.column_norm(central.coefficients)
        shapes = {key: total.shape for key, total in fold.sums.items()}
        fresh = {key: deviation * value for key, value in normal_like(draw, shapes).items()}
        before = bands.from_tensors(privacy.noise)
        noise = bands.correlated(fresh, before, central.coefficients)
        delta = {
            key: (fold.sides[key].back(total + noise[key]) / central.cohort).astype(np.float32)
            for key, total in fold.sums.items()
        }
        clip, measures = fold.clip, {"clip_norm": fold.clip, "noise_deviation": deviation / central.cohort}
        if central.adaptive:
            clip = moved(clip, central.adaptive, fold.halves, on_count, central.cohort, draw)
        rows = bands.to_tensors(bands.kept(noise, before, central.coefficients))
        return Merged(delta, measures=measures, privacy=replace(privacy, clip_norm=clip, noise=rows))

    return Merge(init, add, finish, merge.weigh, reads="sum", linear=True, mixed=merge.mixed)


def clipped(delta: Tensors, sides: dict[str, Sides], most: float) -> tuple[dict[str, np.ndarray], float]:
    """`delta` in its coordinates, float64, no longer than `most`, and how long it was."""
    there = {key: sides.get(key, AS_IT_IS).there(value) for key, value in delta.items()}
    size = norm(there)
    factor = 1.0 if size <= most else most / size
    return {key: value * factor for key, value in there.items()}, size
