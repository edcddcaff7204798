"""The mean of products from two sums: what one client sends in each pass, and what the server makes of the sums.

In the first pass client i sends Y_i = B_i (A_i Ω), `(out, width)`, with Ω known to all; of their sum the server takes
an orthonormal basis Q. In the second it sends Z_i = Qᵀ B_i A_i, `(width, in)`, and Q Σ Z_i / K is the mean product,
projected onto Q. Both are plain sums of arrays whose shapes tell nothing of a client's rank.

Where the ranks of all clients add up to no more than the width, the mean of all is exact. The mean of those in the
second sum is exact too if some of the first are missing there, as long as the rows of all A_i are independent: with
rows in common, what clients do may cancel in the first sum, and Q lack what one of them does. In all other cases what
of the mean lies outside Q is lost; how much that is, a few columns of the first sum tell that Q could do without.

Source: Halko, Martinsson and Tropp 2011, "Finding Structure with Randomness", algorithms 4.1 and 5.1, with the passes
over the matrix summed over clients.
"""

from __future__ import annotations

import math

import numpy as np

from fedpeft.adapters import Factors
from fedpeft.randomness import rng

OVERSAMPLING = 8
"""Columns beyond twice the rank: with p of them beyond the rank r, the expected error is at most √(1 + r / (p − 1))
times that of the best approximation at rank r (Halko et al. 2011, theorem 10.5)."""


PROBES = 4
"""Columns of the first sum by which the loss is measured."""


def width_of(wished: int, rank: int, shape: tuple[int, int]) -> int:
    """The columns of a sketch: as wished (0: twice the server's rank and `OVERSAMPLING`), no more than are needed."""
    return min(wished or 2 * rank + OVERSAMPLING, *shape)


def directions(seed: int, round_: int, path: str, inputs: int, width: int) -> np.ndarray:
    """Ω `(inputs, width)`, the same wherever it is drawn; its variance keeps ‖T Ω‖_F near ‖T‖_F."""
    drawn: np.ndarray = rng(seed, round_, path, "sketch").standard_normal((inputs, width)) / np.sqrt(width)
    return drawn


def first(product: Factors, omega: np.ndarray) -> np.ndarray:
    """What a client sends in the first pass, `(out, width)`."""
    sent: np.ndarray = product.b @ (product.a @ omega)
    return sent


def basis(total: np.ndarray) -> np.ndarray:
    """Q `(out, width)`, with orthonormal columns that span those of the first sum."""
    q: np.ndarray = np.linalg.qr(total)[0]
    return q


def lost(total: np.ndarray, inputs: int) -> float:
    """About ‖(I − QQᵀ) T‖_F, of the product T whose first sum is `total` `(out, width)`; no less on average.

    With P the basis of all but the last `PROBES` columns, what of those lies outside P has the expected square of
    ‖(I − PPᵀ) T‖² PROBES / width, and Q, which holds P, loses no more than P does.

    Source: Halko et al. 2011, section 4.3, with the mean square in place of the greatest.
    """
    width = total.shape[1]
    if width >= min(total.shape[0], inputs):
        return 0.0
    probes = min(PROBES, width - 1)
    if probes < 1:
        return math.nan
    known, probe = basis(total[:, :-probes]), total[:, -probes:]
    return float(np.linalg.norm(probe - known @ (known.T @ probe))) * math.sqrt(width / probes)


def second(product: Factors, q: np.ndarray) -> np.ndarray:
    """What a client sends in the second pass, `(width, in)`; it is no longer than the product."""
    sent: np.ndarray = (q.T @ product.b) @ product.a
    return sent


def mean(q: np.ndarray, total: np.ndarray, weight: float) -> Factors:
    """The mean product of those in the second sum, projected onto Q; `weight` is what they weigh together."""
    return Factors(q, total / weight)
