"""Who masks with whom: everybody with everybody in a small cohort, random neighbours in a large one.

Each client chooses `degree` others by its own entropy; they and itself are the *holders* of its secrets, and it masks
with those it chose and those that chose it. Where that is everybody, what is promised is certain. Where it is not, it
is likely, and the functions here bound how unlikely it fails: exact hypergeometric tails and union bounds, in bits.

Source: Bell et al. 2020, section 4, where shares too go only to neighbours that a client chose itself. Their theorems
give degrees that grow as log n; here the tails are summed, which gives smaller ones. The bound on colluding servers
lets the server choose who falls silent after it has seen the graph.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from fedpeft.privacy.secure.entropy import Entropy, words

MOST_COMPLETE = 64
"""Up to so many clients all mask with all: the promise is certain, and costs a client a fraction of a second."""

_MOST_CELLS = 2**20


def chosen(others: Sequence[int], degree: int, entropy: Entropy) -> tuple[int, ...]:
    """`degree` of `others`, each set of so many as likely as any other, in order."""
    order = np.argsort(words(entropy, len(others)), kind="stable")[:degree]
    return tuple(sorted(others[at] for at in order.tolist()))


def holders(clients: int, degree: int) -> int:
    """How many hold shares of a client's secrets, itself included, where so many clients are on the roster."""
    return min(degree, clients - 1) + 1


@lru_cache(maxsize=256)
def exposure_bits(clients: int, degree: int, threshold: int, colluding: int) -> float:
    """At most 2^−bits is the chance that a hostile server with `colluding` clients can learn more than one sum.

    Infinite where it cannot, 0 where it can. Two things are counted. (a) That some honest client has so many
    colluding holders that these and two halves of the others open both of its secrets: 2 t ≤ h + m. (b) That there
    are at most half of the honest clients whose sum can be opened apart, each of whom has t − 1 of those it chose
    among them or among the colluding.
    """
    held = holders(clients, degree)
    if held == clients:
        return math.inf if 2 * threshold > clients + colluding else 0.0
    honest = clients - colluding
    if 2 * threshold <= held or honest < 2:
        return 0.0
    both = math.log(honest) + float(_log_tail(clients - 1, np.array([colluding]), held - 1, 2 * threshold - held)[0])
    sizes = np.arange(1, honest // 2 + 1)
    apart = _log_tail(clients - 1, colluding + sizes - 1, held - 1, threshold - 1)
    with np.errstate(invalid="ignore"):
        sets = _log_choose(np.full_like(sizes, honest), sizes) + sizes * apart
    return _bits(np.append(sets, both))


@lru_cache(maxsize=256)
def failure_bits(clients: int, degree: int, threshold: int, dropped: int) -> float:
    """At most 2^−bits is the chance that a sum cannot be opened where only `dropped` clients fall silent, any of them.

    It cannot where of some client fewer than `threshold` holders are left.
    """
    held = holders(clients, degree)
    if held == clients:
        return math.inf if clients - dropped >= threshold else 0.0
    tail = _log_tail(clients - 1, np.array([dropped]), held - 1, held - threshold)
    return _bits(math.log(clients) + tail)


@lru_cache(maxsize=256)
def least_degree(clients: int, dropped: int, colluding: int, bits: float, failing_bits: float) -> tuple[int, int]:
    """The least degree, and a threshold, with which exposure is 2^−`bits` at most and failure 2^−`failing_bits`.

    The complete graph, with the least threshold that is safe in it, for up to `MOST_COMPLETE` clients or where no
    smaller degree will do.
    """
    low, high, found = 1, clients - 1, (clients - 1, (clients + colluding) // 2 + 1)
    if clients <= MOST_COMPLETE:
        return found
    while low < high:
        degree = (low + high) // 2
        threshold = _least_threshold(clients, degree, colluding, bits)
        if threshold and failure_bits(clients, degree, threshold, dropped) >= failing_bits:
            high, found = degree, (degree, threshold)
        else:
            low = degree + 1
    return found


def _least_threshold(clients: int, degree: int, colluding: int, bits: float) -> int:
    """The least threshold with which exposure is 2^−`bits` at most; 0 if none is."""
    low, high = (degree + 1) // 2 + 1, degree + 2
    while low < high:
        threshold = (low + high) // 2
        if exposure_bits(clients, degree, threshold, colluding) >= bits:
            high = threshold
        else:
            low = threshold + 1
    return low if low <= degree + 1 else 0


def _log_tail(population: int, marked: np.ndarray, draws: int, least: int) -> np.ndarray:
    """The log of P[at least `least` of `draws` without replacement are marked], for each number of marked `(k,)`."""
    if least <= 0:
        return np.zeros(len(marked))
    counts = np.arange(least, draws + 1)[None, :]
    # In parts, so that terms that a server makes up cannot exhaust a node's memory.
    parts = np.array_split(marked[:, None], -(-len(marked) * max(counts.size, 1) // _MOST_CELLS))
    logs = [_log_sum(_log_choose(many, counts) + _log_choose(population - many, draws - counts)) for many in parts]
    found: np.ndarray = np.concatenate(logs) - _log_choose(np.array([population]), np.array([draws]))
    return found


def _log_choose(total: np.ndarray, taken: np.ndarray) -> np.ndarray:
    """The log of C(total, taken), elementwise; −∞ where it is 0."""
    logs = _log_factorials(1 << int(np.max(total)).bit_length())
    possible = (taken >= 0) & (taken <= total)
    few = np.where(possible, taken, 0)
    return np.where(possible, logs[total] - logs[few] - logs[np.where(possible, total - few, 0)], -np.inf)


@lru_cache(maxsize=4)
def _log_factorials(count: int) -> np.ndarray:
    return np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, count + 1)))])


def _log_sum(logs: np.ndarray) -> np.ndarray:
    """The log of Σ e^logs over the last axis."""
    most = np.max(logs, axis=-1, keepdims=True, initial=-np.inf)
    with np.errstate(divide="ignore", invalid="ignore"):
        found: np.ndarray = np.log(np.sum(np.exp(logs - most), axis=-1)) + most[..., 0]
    return np.where(np.isneginf(most[..., 0]), -np.inf, found)


def _bits(logs: np.ndarray) -> float:
    """−log₂ Σ e^logs, at least 0."""
    return max(-float(_log_sum(logs)) / math.log(2.0), 0.0)
