"""The weighted mean of deltas that came at unlike ranks, tensor by tensor.

A client of rank r speaks for the leading rows and columns. What it never held counts as zero (HetLoRA, zero
padding), so the rows that it lacks shrink by its share; or, with "covered", as not there, so that each row is
the mean over the clients that hold it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from fedpeft.adapters import Tensors, fit

MISSING = ("zero", "covered")
"""What a row counts as that a client does not hold."""


class Sums(NamedTuple):
    """Float64 by key: Σ w_k Δ_k, and Σ w_k over the clients that hold each number (one for all, or one for each)."""

    deltas: dict[str, np.ndarray]
    covered: dict[str, np.ndarray]


def begin(shapes: Mapping[str, tuple[int, ...]]) -> Sums:
    """The sums of no clients; `shapes` are of what clients send, at the server's rank."""
    return Sums({key: np.zeros(shape) for key, shape in shapes.items()}, {key: np.zeros(()) for key in shapes})


def add(sums: Sums, delta: Tensors, weight: float) -> Sums:
    """The sums with one more client, whose `delta` may have lower ranks and lack modules."""
    deltas, covered = dict(sums.deltas), dict(sums.covered)
    for key, value in delta.items():
        if key in deltas:
            shape = deltas[key].shape
            deltas[key] = deltas[key] + weight * fit(value, shape).astype(np.float64)
            covered[key] = covered[key] + weight * _mask(value.shape, shape)
    return Sums(deltas, covered)


def mean(sums: Sums, before: Tensors, weight: float, missing: str) -> dict[str, np.ndarray]:
    """The delta that moves `before` to the clients' mean, float32; `weight` is that of all clients together."""
    if missing == "covered":
        return {
            key: np.divide(total, held, out=np.zeros_like(total), where=held > 0).astype(np.float32)
            for key, (total, held) in _paired(sums).items()
        }
    return {
        key: (total / weight - (1.0 - held / weight) * before[key]).astype(np.float32)
        for key, (total, held) in _paired(sums).items()
    }


def _paired(sums: Sums) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    return {key: (total, np.broadcast_to(sums.covered[key], total.shape)) for key, total in sums.deltas.items()}


def _mask(held: tuple[int, ...], full: tuple[int, ...]) -> np.ndarray:
    """1 where a client holds the number; a single 1 where it holds them all."""
    if held == full:
        return np.ones(())
    mask = np.zeros(full)
    mask[tuple(slice(size) for size in held)] = 1.0
    return mask
