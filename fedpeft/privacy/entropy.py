"""Where private randomness comes from: the operating system, or for experiments that must repeat, a seed."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping

import numpy as np

from fedpeft.randomness import rng

Uniforms = Callable[[int], np.ndarray]
"""So many independent numbers, uniform on [0, 1) with 53 bits each, float64."""

Source = Callable[..., Uniforms]
"""`source(seed, *labels)`: uniform numbers for one purpose."""

_UNIT = 2.0**-53


def from_system(seed: int, *labels: int | str) -> Uniforms:  # noqa: ARG001
    """Numbers that nobody can draw again, from the operating system's cryptographic generator."""

    def draw(count: int) -> np.ndarray:
        words = np.frombuffer(os.urandom(8 * count), np.uint64)
        return (words >> np.uint64(11)).astype(np.float64) * _UNIT

    return draw


def from_seed(seed: int, *labels: int | str) -> Uniforms:
    """Numbers that whoever knows the seed can draw again: they repeat an experiment, and protect nobody."""
    return rng(seed, *labels, "privacy").random


SOURCES: Mapping[str, Source] = {"os": from_system, "seed": from_seed}
"""Every source of private randomness, by name."""


def normals(draw: Uniforms, count: int) -> np.ndarray:
    """So many independent standard normal numbers, float64, none further out than 8.6 (odds of 10⁻¹⁷).

    Source: Box and Muller 1958, "A Note on the Generation of Random Normal Deviates".
    """
    half = (count + 1) // 2
    radius, angle = np.sqrt(-2.0 * np.log1p(-draw(half))), 2.0 * np.pi * draw(half)
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]


def normal_like(draw: Uniforms, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Standard normal tensors of these shapes, in order of key, float64."""
    sizes = {key: int(np.prod(shapes[key], dtype=np.int64)) for key in sorted(shapes)}
    numbers, start, found = normals(draw, sum(sizes.values())), 0, {}
    for key, size in sizes.items():
        found[key], start = numbers[start : start + size].reshape(shapes[key]), start + size
    return found
