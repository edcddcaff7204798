"""How far one client may reach: a bound that stands, or one that finds the clients' own median."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fedpeft.privacy.entropy import Uniforms, normals

LEAST_OVER_NOISE = 1.64
"""The least noise on the count of short updates, in noise multipliers: the rest needs 5 % more noise to pay for it."""


@dataclass(frozen=True)
class Adaptive:
    """A clipping norm that follows the `quantile` of the clients' norms.

    `rate` is how fast, in powers of e a round; `noise` the standard deviation on the count of short updates.

    Source: Andrew et al. 2021, "Differentially Private Learning with Adaptive Clipping", algorithm 1.
    """

    quantile: float = 0.5
    rate: float = 0.2
    noise: float = 0.0


def count_noise(adaptive: Adaptive, noise_multiplier: float, cohort: int) -> float:
    """The standard deviation on the count: as set, or a twentieth of the cohort, or more where that buys nothing."""
    return adaptive.noise or max(cohort / 20.0, LEAST_OVER_NOISE * noise_multiplier)


def update_noise(noise_multiplier: float, on_count: float) -> float:
    """The noise multiplier on updates that, with the count released too, costs what `noise_multiplier` alone would.

    The count of halves, (short − long) / 2, moves by 1/2 with one client.

    Source: Andrew et al. 2021, theorem 1: z_Δ = (z⁻² − (2 σ_b)⁻²)^(−1/2).
    """
    left = noise_multiplier**-2 - (2.0 * on_count) ** -2
    return left**-0.5 if left > 0 else math.inf


def moved(clip: float, adaptive: Adaptive, halves: float, on_count: float, cohort: int, draw: Uniforms) -> float:
    """The clipping norm of the next round; `halves` is (short − long) / 2 over the clients that came.

    Short are those whose norm *before* clipping was at most `clip`. With too many of them the bound falls.
    """
    short = (halves + on_count * float(normals(draw, 1)[0])) / cohort + 0.5
    return clip * math.exp(-adaptive.rate * (short - adaptive.quantile))
