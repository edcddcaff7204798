"""Rules that combine updates of which some may be hostile.

Two kinds, both plain functions of arrays. A *judge* reads the Gram matrix of the updates and says how much of each
is used, so that one verdict serves tensors and low-rank products alike (see `fedpeft.merges.gram`). A *coordinate
rule* combines the values that the clients have at each coordinate; it is called tensor by tensor, so that memory is
K × one tensor. Each says how many clients it needs at least: a plan with fewer can be refused before its first round,
and a round with fewer is a QuorumError, never a quiet mean.

A judge takes `gram` `(K, K)`, G_ij = ⟨update_i, update_j⟩, and `weights` `(K,)`, positive, of any sum. Ties go to the
client that comes first, so the order of clients must not depend on when their replies arrived. Distances are taken
as G_ii + G_jj − 2 G_ij, which rounding can bring below 0: they are clamped at 0, and updates closer together than
about 1e-8 of their norm count as equal.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from fedpeft.errors import FederationError, QuorumError, sentence


class Verdict(NamedTuple):
    """How much of each update is used: Σ_k weights_k scales_k update_k.

    `weights` `(K,)` are at least 0 and sum to 1, `scales` `(K,)` are from 0 to 1; both float64.
    """

    weights: np.ndarray
    scales: np.ndarray

    @property
    def shares(self) -> np.ndarray:
        """What each update is multiplied by before they are summed, `(K,)`."""
        shares: np.ndarray = self.weights * self.scales
        return shares


class Judge(NamedTuple):
    """`judge(gram, weights)` is the verdict on the updates of a round, of which there are at least `least_clients`.

    It raises QuorumError with fewer, FederationError if a number is not finite or a weight is not positive.
    """

    least_clients: int
    judge: Callable[[np.ndarray, np.ndarray], Verdict]


class Coordinate(NamedTuple):
    """`combine(values)` makes one float64 array `(...)` of the values `(K, ...)` of at least `least_clients`.

    Clients count alike whatever they trained on: a weight that a client states for itself would be a vote that it
    gives itself. It raises QuorumError with fewer clients; values are finite.
    """

    least_clients: int
    combine: Callable[[np.ndarray], np.ndarray]


def krum(byzantine: int) -> Judge:
    """The one update whose K − f − 2 nearest are nearest, f = `byzantine`; needs 2 f + 3 clients.

    Weights play no part.

    Source: Blanchard et al. 2017, "Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent", the
    Krum function.
    """
    return _multi_krum("krum", byzantine, 1)


def multi_krum(byzantine: int, kept: int = 0) -> Judge:
    """The weighted mean of the `kept` updates that Krum scores best; 0 keeps K − f of the K that came.

    Needs 2 f + 3 clients, and `kept` + f: keeping more than K − f would keep an attacker for certain.

    Source: Blanchard et al. 2017, Multi-Krum, where all that are kept weigh alike; here scores are unweighted and
    the mean is weighted.
    """
    return _multi_krum("multi_krum", byzantine, kept)


def bulyan_selection(byzantine: int) -> Judge:
    """Bulyan's first phase: K − 2 f updates of equal weight, each the best by Krum of those that are left.

    The second phase, `bulyan_mean`, takes the values of the updates whose weight is not 0. Needs 4 f + 3 clients;
    weights play no part.

    Source: El Mhamdi et al. 2018, "The Hidden Vulnerability of Distributed Learning in Byzantium", Bulyan(Krum).
    The last two updates are chosen among fewer than the 2 f + 3 that Krum asks for. For the very last, n − f − 2 is
    f − 1, and f attackers who agree with each other would score 0, so here an update is judged by at least f + 1
    neighbours, as many as Krum has where it is allowed.
    """

    def rule(gram: np.ndarray, weights: np.ndarray) -> Verdict:  # noqa: ARG001
        distances, left = squared_distances(gram), list(range(len(gram)))
        chosen = np.zeros(len(gram))
        for _ in range(len(gram) - 2 * byzantine):
            scores = _krum_scores(distances[np.ix_(left, left)], max(len(left) - byzantine - 2, byzantine + 1))
            chosen[left.pop(int(np.argmin(scores)))] = 1.0
        return _unscaled(chosen)

    return _judge("bulyan_selection", 4 * byzantine + 3, rule)


def geometric_median(iterations: int = 10_000, smoothing: float = 1e-6, tolerance: float = 1e-9) -> Judge:
    """The point of least weighted distance to the updates, as a weighted mean of them; attackers hold under half.

    Half of the weight, that is, so weights that clients state for themselves must be bounded. `smoothing` is the
    distance under which an update pulls no harder, as a share of the weighted median of the updates' norms. It ends
    when a step is below `tolerance` of the median distance to the updates, or after `iterations`.

    Source: Pillutla et al. 2022, "Robust Aggregation for Federated Learning", the smoothed Weiszfeld algorithm, with
    the iterate kept as weights so that G gives every distance. Three deviations. The paper's ν is a length; a share
    makes the verdict the same for updates of any scale, where a length above them all gives the mean. The first
    point, free in the paper, is the mean of the half nearest to the most central update, since from the mean of all
    the number of steps grows with the size of an attack. And a step is compared with a distance that attackers do
    not set, since they do set the objective.
    """

    def rule(gram: np.ndarray, weights: np.ndarray) -> Verdict:
        floor = max(smoothing * _weighted_median(_norms(gram), weights), _TINY)
        mixture = _central_half(gram, weights)
        for _ in range(iterations):
            distances = _distances_to(gram, mixture)
            pulls = weights / np.maximum(distances, floor)
            following = pulls / pulls.sum()
            step, mixture = following - mixture, following
            moved = np.sqrt(max(float(step @ gram @ step), 0.0))
            if moved <= tolerance * max(_weighted_median(distances, weights), floor):
                break
        return _unscaled(mixture)

    return _judge("geometric_median", 1, rule)


def norm_bound(limit: float = 0.0) -> Judge:
    """The weighted mean of updates each scaled down to the norm `limit`; 0 is the median of this round's norms.

    It bounds how far an attacker can pull, and turns nobody away. A median bounds nothing that half of the clients
    do not respect, and with one client nothing at all.

    Source: Sun et al. 2019, "Can You Really Backdoor Federated Learning?", norm thresholding.
    """

    def rule(gram: np.ndarray, weights: np.ndarray) -> Verdict:
        norms = _norms(gram)
        bound = limit or float(np.median(norms))
        return Verdict(weights, np.divide(bound, norms, out=np.ones_like(norms), where=norms > bound))

    return _judge("norm_bound", 1, rule)


def coordinate_median() -> Coordinate:
    """At each coordinate the median, of an even number of values the mean of the middle two.

    Source: Yin et al. 2018, "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates", definition 1.
    """
    return _coordinate("coordinate_median", 1, lambda values: np.median(values, axis=0))


def trimmed_mean(trimmed: int) -> Coordinate:
    """At each coordinate the mean without the `trimmed` largest and as many smallest; needs 2 `trimmed` + 1 clients.

    Source: Yin et al. 2018, definition 2, with the count β K as a number of clients.
    """

    def rule(values: np.ndarray) -> np.ndarray:
        found: np.ndarray = np.sort(values, axis=0)[trimmed : len(values) - trimmed].mean(axis=0)
        return found

    return _coordinate("trimmed_mean", 2 * trimmed + 1, rule)


def bulyan_mean(byzantine: int) -> Coordinate:
    """Bulyan's second phase, on the n = K − 2 f selected: per coordinate, the mean of the n − 2 f nearest the median.

    Needs 2 f + 3 of them, which `bulyan_selection` leaves. Of values equally near, the earlier client's counts.

    Source: El Mhamdi et al. 2018, Bulyan(Krum).
    """

    def rule(values: np.ndarray) -> np.ndarray:
        distances = np.abs(values - np.median(values, axis=0))
        nearest = np.argsort(distances, axis=0, kind="stable")[: len(values) - 2 * byzantine]
        found: np.ndarray = np.take_along_axis(values, nearest, axis=0).mean(axis=0)
        return found

    return _coordinate("bulyan_mean", 2 * byzantine + 3, rule)


def squared_distances(gram: np.ndarray) -> np.ndarray:
    """‖update_i − update_j‖² of each pair, `(K, K)`, clamped at 0."""
    squares = np.diagonal(gram)
    found: np.ndarray = np.maximum(squares[:, None] + squares[None, :] - 2 * gram, 0.0)
    np.fill_diagonal(found, 0.0)
    return found


_TINY = float(np.finfo(np.float64).tiny)
"""The least distance that a weight is divided by: the quotients' sum is still finite."""


def _judge(name: str, least: int, rule: Callable[[np.ndarray, np.ndarray], Verdict]) -> Judge:
    """`rule`, on weights that sum to 1, behind the checks that all judges share."""

    def judge(gram: np.ndarray, weights: np.ndarray) -> Verdict:
        _require_clients(name, least, len(gram))
        # An argmin or a median of NaN is the NaN, so the one broken update would be the one chosen.
        if not np.isfinite(gram).all():
            raise FederationError(
                sentence(
                    name,
                    expected="finite updates",
                    found="NaN or infinity in their Gram matrix",
                    remedy="refuse updates that are not finite before they are compared",
                )
            )
        if not (np.isfinite(weights).all() and (weights > 0).all()):
            raise FederationError(
                sentence(
                    name,
                    expected="finite positive weights",
                    found=f"{np.min(weights)} among them",
                    remedy="refuse updates that count for nothing",
                )
            )
        return rule(gram, weights / weights.sum())

    return Judge(least, judge)


def _coordinate(name: str, least: int, rule: Callable[[np.ndarray], np.ndarray]) -> Coordinate:
    def combine(values: np.ndarray) -> np.ndarray:
        _require_clients(name, least, len(values))
        return rule(values.astype(np.float64))

    return Coordinate(least, combine)


def _require_clients(name: str, least: int, clients: int) -> None:
    if clients < least:
        raise QuorumError(
            sentence(
                name,
                expected=f"at least {least} updates, as its setting needs",
                found=str(clients),
                remedy="enlarge the cohort and the quorum, or let the rule withstand fewer attackers",
            )
        )


def _multi_krum(name: str, byzantine: int, kept: int) -> Judge:
    def rule(gram: np.ndarray, weights: np.ndarray) -> Verdict:
        scores = _krum_scores(squared_distances(gram), len(gram) - byzantine - 2)
        best = np.argsort(scores, kind="stable")[: kept or len(gram) - byzantine]
        chosen = np.zeros(len(gram))
        chosen[best] = weights[best]
        return _unscaled(chosen)

    return _judge(name, max(2 * byzantine + 3, kept + byzantine), rule)


def _krum_scores(distances: np.ndarray, neighbours: int) -> np.ndarray:
    """Sum of each row's `neighbours` smallest entries, its own 0 apart."""
    found: np.ndarray = np.sort(distances, axis=1)[:, 1 : 1 + neighbours].sum(axis=1)
    return found


def _unscaled(weights: np.ndarray) -> Verdict:
    return Verdict(weights / weights.sum(), np.ones(len(weights)))


def _norms(gram: np.ndarray) -> np.ndarray:
    found: np.ndarray = np.sqrt(np.maximum(np.diagonal(gram), 0.0))
    return found


def _distances_to(gram: np.ndarray, mixture: np.ndarray) -> np.ndarray:
    """Distance of each update from Σ_k mixture_k update_k, `(K,)`."""
    across = gram @ mixture
    found: np.ndarray = np.sqrt(np.maximum(mixture @ across - 2 * across + np.diagonal(gram), 0.0))
    return found


def _central_half(gram: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The weights of the half nearest to the update of least weighted distance to all, summing to 1."""
    distances = np.sqrt(squared_distances(gram))
    from_centre = distances[np.argmin(distances @ weights)]
    near = np.where(from_centre <= _weighted_median(from_centre, weights), weights, 0.0)
    found: np.ndarray = near / near.sum()
    return found


def _weighted_median(values: np.ndarray, weights: np.ndarray) -> float:
    """The least value such that values up to it hold over half of the weight; weights sum to 1."""
    order = np.argsort(values, kind="stable")
    at = np.searchsorted(np.cumsum(weights[order]), 0.5, side="right")
    return float(values[order][at])
