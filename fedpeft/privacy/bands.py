"""Noise that is taken back in later rounds: banded matrix factorisation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

Noise = Mapping[str, np.ndarray]


def square_root(bands: int) -> tuple[float, ...]:
    """The first column of the lower-triangular Toeplitz matrix C: the first `bands` coefficients of (1 − x)^(−1/2).

    The mechanism releases x + C⁻¹ z, z Gaussian, so that sums of rounds carry less noise than each round alone.

    Source: Kalinin and Lampert 2024, "Banded Square Root Matrix Factorization for Differentially Private Model
    Training", definition 1, for plain SGD; Choquette-Choo et al. 2023, "(Amplified) Banded Matrix Factorization".
    """
    found = [1.0]
    for at in range(1, bands):
        found.append(found[-1] * (2 * at - 1) / (2 * at))
    return tuple(found)


def column_norm(coefficients: Sequence[float]) -> float:
    """The greatest norm of a column of C: how far one client's part in one round reaches.

    Parts that are at least as many rounds apart as there are bands do not overlap.
    """
    return float(np.linalg.norm(coefficients))


def correlated(fresh: Noise, before: Sequence[Noise], coefficients: Sequence[float]) -> dict[str, np.ndarray]:
    """This round's row of C⁻¹ z: `fresh` is z of this round, `before` the rows of the rounds before, newest first."""
    pairs = list(zip(coefficients[1:], before, strict=False))
    return {key: value - sum((c * row[key] for c, row in pairs), np.zeros(())) for key, value in fresh.items()}


def kept(noise: Noise, before: Sequence[Noise], coefficients: Sequence[float]) -> list[Noise]:
    """The rows that the next round takes up, newest first."""
    return [noise, *before][: len(coefficients) - 1]


def to_tensors(rows: Sequence[Noise]) -> dict[str, np.ndarray]:
    """Rows as flat tensors, by `age/key`."""
    return {f"{age}/{key}": value for age, row in enumerate(rows) for key, value in row.items()}


def from_tensors(tensors: Noise) -> list[dict[str, np.ndarray]]:
    """Rows of what `to_tensors` made."""
    rows: dict[int, dict[str, np.ndarray]] = {}
    for name, value in tensors.items():
        age, _, key = name.partition("/")
        rows.setdefault(int(age), {})[key] = value
    return [rows[age] for age in sorted(rows)]
