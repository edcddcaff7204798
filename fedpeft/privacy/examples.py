"""Example-level privacy: what a client's training hides of each of its rows, and what a run of it costs.

Every step adds up the gradients of the examples that it drew, each clipped, and adds noise to the sum. Neighbouring
data sets differ in one example that takes part or does not; how many rows a site has is held to be public.

Source: Abadi et al. 2016, "Deep Learning with Differential Privacy", algorithm 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from fedpeft.errors import ConfigError, sentence
from fedpeft.privacy.entropy import SOURCES, Uniforms, normal_like

POISSON, SHUFFLED = "poisson", "shuffled"
EXAMPLE_SAMPLERS = (POISSON, SHUFFLED)
"""How a step's examples are drawn."""


@dataclass(frozen=True)
class ExamplePrivacy:
    """How a client hides each of its examples from whoever sees its update.

    `clip_norm` C > 0 bounds the gradient of each example: its Euclidean norm over all trained tensors. The noise on
    a step's sum of them has a standard deviation of z C, z = `noise_multiplier` ≥ 0.

    `sampler` "poisson" draws every example for every step by a coin of its own, so a step may have none, and is then
    noise alone; "shuffled" goes through all examples in turn, each at most once in a step, and claims no
    amplification. `entropy` "os" takes noise and coins from the operating system; "seed" derives them from the run's
    seed, so that an experiment repeats, and hides nothing from whoever knows the seed.

    What a client tells beside its update is not protected: its loss, the share of clipped gradients, its tokens.

    Raises:
        ConfigError: a field is out of its range.
    """

    clip_norm: float
    noise_multiplier: float
    sampler: str = POISSON
    entropy: str = "os"

    def __post_init__(self) -> None:
        _require(0 < self.clip_norm < np.inf, "clip_norm", "a number above 0", self.clip_norm)
        _require(0 <= self.noise_multiplier < np.inf, "noise_multiplier", "0 or more", self.noise_multiplier)
        _require(self.sampler in EXAMPLE_SAMPLERS, "sampler", f"one of {', '.join(EXAMPLE_SAMPLERS)}", self.sampler)
        _require(self.entropy in SOURCES, "entropy", f"one of {', '.join(SOURCES)}", self.entropy)


@dataclass(frozen=True)
class Cost:
    """A Gaussian mechanism of `noise_multiplier` on a Poisson sample of `rate` (1: no sampling), `steps` times over."""

    rate: float
    noise_multiplier: float
    steps: int


def cost(privacy: ExamplePrivacy, rows: int, batch: int, steps: int) -> Cost:
    """What `steps` steps cost a site with `rows` rows; `batch` is what one of them is to draw, on average.

    The steps of all rounds count in which the site has trained, also of one whose update was lost on the way or asked
    for again: composed over R rounds of S steps each it is `steps` = R S.

    "Shuffled" is charged as if every example were in every step. Its neighbours put an empty example, of gradient
    zero, in the place of one (Kairouz et al. 2021, "Practical and Private (Deep) Learning without Sampling or
    Shuffling", definition 1.1).
    """
    rate = sampling_rate(rows, batch) if privacy.sampler == POISSON else 1.0
    return Cost(rate, privacy.noise_multiplier, steps)


def sampling_rate(rows: int, batch: int) -> float:
    """The probability q with which each of `rows` rows is in a step that is to draw `batch` of them on average."""
    return min(1.0, batch / rows)


def expected_examples(rows: int, batch: int) -> float:
    """How many examples a step draws on average, and what its sum is divided by: `batch`, or all rows if fewer."""
    return float(min(rows, batch))


def poisson(draw: Uniforms, rows: int, rate: float) -> np.ndarray:
    """The rows of one step, in order: each by a coin of its own that says yes with probability `rate`."""
    return np.flatnonzero(draw(rows) < rate)


def released(
    sums: Mapping[str, np.ndarray], privacy: ExamplePrivacy, examples: float, draw: Uniforms
) -> dict[str, np.ndarray]:
    """(Sums + N(0, z² C² I)) / `examples`, float64; `sums` are those of the clipped gradients, by tensor.

    Noise is drawn in float64 for all tensors at once. Numbers are not rounded to a grid, which an attacker who reads
    their last bits could use (Mironov 2012, "On Significance of the Least Significant Bits for Differential Privacy").
    """
    scale = privacy.noise_multiplier * privacy.clip_norm
    noise = normal_like(draw, {key: value.shape for key, value in sums.items()})
    return {key: (value + scale * noise[key]) / examples for key, value in sums.items()}


def _require(holds: bool, key: str, expected: str, found: object) -> None:
    if not holds:
        raise ConfigError(sentence(f"example privacy, {key}", expected=expected, found=found, remedy="correct it"))
