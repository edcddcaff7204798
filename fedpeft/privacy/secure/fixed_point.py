"""Real numbers as integers of a fixed step, so that they can be summed modulo a power of 2, and back."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from fedpeft.errors import AdapterError, ConfigError, sentence
from fedpeft.privacy.secure.entropy import SYSTEM, Entropy, words
from fedpeft.privacy.secure.terms import width_for

_MOST_TRIES = 64


@dataclass(frozen=True)
class Grid:
    """The multiples of `step` from −`clip` to `clip`, 2^`bits` − 1 of them, 0 among them.

    Rounded at random a number is off by less than a step, on average by nothing, with a variance of at most step²/4;
    rounded to the nearest by half a step at most, and always in the same direction. So the sum of n inputs that were
    rounded at random has a standard error of at most step · √n / 2 in each place.

    Raises:
        ConfigError: `clip` is not a positive number, or `bits` not from 2 to 32.
    """

    clip: float
    bits: int

    def __post_init__(self) -> None:
        if not (0 < self.clip < math.inf and 2 <= self.bits <= 32):
            expected = "a positive clip and from 2 to 32 bits"
            found = f"clip {self.clip:g} and {self.bits} bits"
            raise ConfigError(sentence("fixed point", expected=expected, found=found, remedy="correct the setting"))

    @property
    def levels(self) -> int:
        """The greatest integer that a number becomes."""
        return (1 << (self.bits - 1)) - 1

    @property
    def step(self) -> float:
        """How far apart two neighbours are."""
        return self.clip / self.levels

    def width(self, clients: int) -> int:
        """The bits that a sum over so many clients needs: never more than n · 2^`bits` does, without any noise."""
        return width_for(clients, self.levels)


def quantised(values: np.ndarray, grid: Grid, entropy: Entropy = SYSTEM) -> np.ndarray:
    """`values` as integers, int64, each rounded up or down at random so that its mean is itself.

    Raises:
        AdapterError: a value is not finite or lies beyond `grid.clip`.
    """
    return _rounded(_scaled(values, grid), entropy)


def nearest(values: np.ndarray, grid: Grid) -> np.ndarray:
    """`values` as the nearest integers, int64.

    Raises:
        AdapterError: a value is not finite or lies beyond `grid.clip`.
    """
    found: np.ndarray = np.rint(_scaled(values, grid)).astype(np.int64)
    return found


def quantised_within(values: np.ndarray, grid: Grid, norm: float, beta: float, entropy: Entropy = SYSTEM) -> np.ndarray:
    """As `quantised`, drawn again until the integers are no longer than `rounded_norm` says; `norm` bounds ‖values‖.

    A draw is too long with a chance of at most `beta`, so the means are off by as little. This makes the sensitivity
    of the integers certain, which mechanisms of differential privacy need.

    Raises:
        AdapterError: ‖values‖ exceeds `norm`, or a value is not finite or lies beyond `grid.clip`.

    Source: Kairouz et al. 2021, "The Distributed Discrete Gaussian Mechanism", algorithm 1, conditional rounding.
    """
    scaled, most = _scaled(values, grid), rounded_norm(norm / grid.step, values.size, beta)
    length = float(np.linalg.norm(scaled))
    for _ in range(_MOST_TRIES if length <= norm / grid.step * (1.0 + 1e-9) else 0):
        found = _rounded(scaled, entropy)
        if float(np.linalg.norm(found.astype(np.float64))) <= most:
            return found
    raise _unusable(f"numbers of norm at most {norm:g}", f"{length * grid.step:g}")


def rounded_norm(norm: float, size: int, beta: float) -> float:
    """The greatest norm of `size` integers that a vector of norm `norm`, in steps, is rounded to; `beta` as above.

    Source: Kairouz et al. 2021, proposition 22 and theorem 1:
    min(‖x‖ + √d, √(‖x‖² + d/4 + √(2 ln 1/β) (‖x‖ + √d/2))); β = 0 gives the first, which always holds.
    """
    always = norm + math.sqrt(size)
    if not beta:
        return always
    likely = norm**2 + size / 4.0 + math.sqrt(2.0 * math.log(1.0 / beta)) * (norm + math.sqrt(size) / 2.0)
    return min(always, math.sqrt(likely))


def rounded_norm_1(norm: float, size: int) -> float:
    """The greatest sum of magnitudes of `size` integers whose norm is at most `norm`.

    Source: Kairouz et al. 2021, theorem 1: ‖x‖₁ ≤ √d ‖x‖₂, and ≤ ‖x‖₂² as they are integers.
    """
    return norm * min(math.sqrt(size), norm)


def real(total: np.ndarray, grid: Grid) -> np.ndarray:
    """The numbers that a sum of integers stands for, float64."""
    found: np.ndarray = total.astype(np.float64) * grid.step
    return found


def _scaled(values: np.ndarray, grid: Grid) -> np.ndarray:
    wide = np.asarray(values, np.float64)
    most = float(np.max(np.abs(wide), initial=0.0))
    if not most <= grid.clip:
        raise _unusable(f"numbers from {-grid.clip:g} to {grid.clip:g}", f"a magnitude of {most:g}")
    # Dividing by the step can carry a number at the very end past the last level.
    return np.clip(wide * (grid.levels / grid.clip), -grid.levels, grid.levels)


def _rounded(scaled: np.ndarray, entropy: Entropy) -> np.ndarray:
    below = np.floor(scaled)
    draws = (words(entropy, scaled.size) >> np.uint64(11)).astype(np.float64).reshape(scaled.shape)
    found: np.ndarray = (below + (draws < (scaled - below) * 2.0**53)).astype(np.int64)
    return found


def _unusable(expected: str, found: str) -> AdapterError:
    return AdapterError(sentence("fixed point", expected=expected, found=found, remedy="clip before rounding"))
