"""Which words a gradient is made of: the span check, and a greedy search for the words that make it up.

The gradient of a linear layer is a sum over tokens of (what comes back) × (what went in), so its rows lie in the span
of what went in. Of W + B A with x going in, those of ∇A lie in the span of the x, those of ∇B in the span of the A x,
which are as short as the rank: with more tokens than ranks, ∇B alone says nothing.

Source: DAGER, Petrov et al. 2024, "DAGER: Exact Gradient Inversion for Large Language Models", section 4.1, for the
check; where an update has fewer rows than there are tokens, so that no word lies in their span, the words that make
them up are sought greedily: simultaneous orthogonal matching pursuit, Tropp et al. 2006, "Algorithms for Simultaneous
Sparse Approximation, Part I", algorithm 3.1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

_FLAT = 1e-4
"""Singular values below this share of the greatest are rounding."""

_KEPT = 400
"""The words of a position that the greedy search goes on with."""

_APART = 1e-3
"""The least part of a candidate, squared, that must stand outside those that are chosen."""


@dataclass(frozen=True)
class Evidence:
    """Rows `(n, k)` of an update, each a sum over the tokens' inputs, in whitened coordinates.

    `frame` `(k, in)` has orthonormal rows and says what part of an input these coordinates hold: None is all of it.
    """

    rows: np.ndarray
    frame: np.ndarray | None = None

    def seen(self, inputs: np.ndarray) -> np.ndarray:
        """Inputs `(words, in)` in these coordinates, each of length 1."""
        found = inputs if self.frame is None else inputs @ self.frame.T
        return _unit(found)


def of_a(changes: Sequence[np.ndarray], whitening: np.ndarray) -> Evidence:
    """The evidence of changes of A, `(rank, in)` each, of modules that read the same input."""
    return Evidence(_unit(np.concatenate(changes) @ whitening))


def of_b(change: np.ndarray, a: np.ndarray, whitening: np.ndarray) -> Evidence:
    """The evidence of a change of B `(out, rank)` where A `(rank, in)` stood still."""
    across = np.linalg.solve(whitening, a.T).T.astype(np.float32)  # A x = across (x L)
    u, sizes, frame = np.linalg.svd(across, full_matrices=False)
    _, values, v = np.linalg.svd(change @ (u / sizes), full_matrices=False)
    return Evidence(values[:, None] / max(float(values[0]), 1e-30) * v, frame)


def search(
    evidence: Sequence[Sequence[Evidence]], blocks: Callable[[int], np.ndarray], positions: int, most: Sequence[int]
) -> list[np.ndarray]:
    """For each update, of which there are several pieces of evidence, how much each word looks like one of its own.

    `blocks(position)` are the words' inputs at a position, whitened, `(words, in)`. Scores are `(words,)`, at best over
    the positions: up to 1 by the span check, and above 1 for the words, up to `most` of them, that the greedy search
    chose, the first the highest.
    """
    bases = [[_basis(piece.rows) for piece in pieces] for pieces in evidence]
    best: list[np.ndarray] = []
    kept: list[list[tuple[np.ndarray, list[np.ndarray]]]] = [[] for _ in evidence]
    for position in range(positions):
        inputs = blocks(position)
        for at, pieces in enumerate(evidence):
            seen = [piece.seen(inputs) for piece in pieces]
            scores = span_scores(seen, bases[at])
            top = np.argpartition(-scores, min(_KEPT, len(scores)) - 1)[:_KEPT]
            kept[at].append((top, [one[top] for one in seen]))
            best[at : at + 1] = [np.maximum(best[at], scores) if position else scores]
    found = []
    for pieces, scores, candidates, count in zip(evidence, best, kept, most, strict=True):
        words = np.concatenate([top for top, _ in candidates])
        atoms = [np.concatenate([seen[at] for _, seen in candidates]) for at in range(len(pieces))]
        chosen = list(dict.fromkeys(words[pursuit([piece.rows for piece in pieces], atoms, count)].tolist()))
        scores = scores.copy()
        scores[chosen] = 2 - np.arange(len(chosen)) / max(1, len(chosen))
        found.append(scores)
    return found


def span_scores(seen: Sequence[np.ndarray], bases: Sequence[np.ndarray]) -> np.ndarray:
    """How much of each candidate lies in the span of the rows, 0 to 1, a mean over the pieces of evidence.

    Where the rows span everything, nothing can be told: all are 0.
    """
    telling = [
        np.square(one @ basis.T).sum(1) for one, basis in zip(seen, bases, strict=True) if len(basis) < basis.shape[1]
    ]
    found: np.ndarray = np.mean(telling, axis=0) if telling else np.zeros(len(seen[0]), np.float32)
    return found


def pursuit(rows: Sequence[np.ndarray], atoms: Sequence[np.ndarray], most: int) -> list[int]:
    """The atoms, up to `most`, that the rows are made of, chosen one by one; the same choice for every piece.

    `rows` are `(n, k)` and `atoms` `(candidates, k)`, of length 1, for each piece of evidence. It ends when nothing is
    left of the rows, or as many are chosen as any rows can be made of.
    """
    chosen: list[int] = []
    bases = [np.zeros((0, one.shape[1]), np.float32) for one in atoms]
    left, whole = list(rows), float(sum(np.square(one).sum() for one in rows))
    room = min([most, *(one.shape[1] - 1 for one in atoms)])
    while len(chosen) < room and sum(float(np.square(one).sum()) for one in left) > _FLAT * whole:
        gains = np.zeros(len(atoms[0]))
        for one, basis, rest in zip(atoms, bases, left, strict=True):
            outside = 1 - np.square(one @ basis.T).sum(1)
            gains += np.where(outside > _APART, np.square(one @ rest.T).sum(1) / np.maximum(outside, _APART), 0.0)
        gains[chosen] = 0.0
        at = int(np.argmax(gains))
        if not gains[at] > 0:
            break
        chosen.append(at)
        for piece, one in enumerate(atoms):
            new = one[at] - bases[piece].T @ (bases[piece] @ one[at])
            size = float(np.linalg.norm(new))
            if size**2 > _APART:
                bases[piece] = np.vstack([bases[piece], new / size])
            left[piece] = rows[piece] - (rows[piece] @ bases[piece].T) @ bases[piece]
    return chosen


def _basis(rows: np.ndarray) -> np.ndarray:
    """Orthonormal rows that span the same."""
    _, sizes, v = np.linalg.svd(rows, full_matrices=False)
    found: np.ndarray = v[sizes > _FLAT * max(float(sizes[0]), 1e-30)]
    return found


def _unit(rows: np.ndarray) -> np.ndarray:
    """Rows of length 1; those of no length stay."""
    sizes = np.linalg.norm(rows, axis=1, keepdims=True)
    found: np.ndarray = rows / np.where(sizes > 0, sizes, 1.0)
    return found
