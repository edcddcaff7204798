"""Robust merges: a verdict on the updates of a round, and any averaging merge of what the verdict leaves.

These see every update at once, so they keep the deltas of a round: memory grows with the cohort. Their
`merge_error` is the distance from the exact mean of the updates as they weigh them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from fedpeft.adapters import ModuleSpec, Tensors
from fedpeft.errors import FederationError
from fedpeft.merges import exactness
from fedpeft.merges.gram import flat_gram, update_gram
from fedpeft.merges.merge import WEIGHTS, Contribution, Merge, Merged
from fedpeft.merges.projections import Gathered, Projected, truncated
from fedpeft.merges.robust import Coordinate, Judge, Verdict
from fedpeft.merges.rule import rule
from fedpeft.updates import ServerState

SPACES = ("factors", "products")
"""What updates are compared by: their numbers, or what their low-rank products do, which no gauge changes."""


class Settled(NamedTuple):
    """What a verdict comes to: a merge, the contributions for it, and how many clients have a share in them."""

    merge: Merge
    contributions: Sequence[Contribution]
    used: int


Settle = Callable[[tuple[ModuleSpec, ...], Sequence[Contribution]], Settled]


class _Fold(NamedTuple):
    state: ServerState
    keys: Collection[str]
    hidden: Collection[str]
    contributions: tuple[Contribution, ...]


def judged(judge: Judge, weights: str, space: str) -> Merge:
    """The merge of what `judge` leaves, by weights as it gives them.

    Updates are compared in `space`. By factors, their factors are averaged too; by products, the exact mean is cut
    to the server's rank, and nodes may be of unlike rank.
    """
    by_products = space == "products"
    inner = rule(weights, truncated, gauge="free", whole=True) if by_products else rule(weights)

    def settle(modules: tuple[ModuleSpec, ...], contributions: Sequence[Contribution]) -> Settled:
        verdict = judge.judge(_gram(modules if by_products else (), contributions), _weights(contributions))
        return Settled(inner, _shared_out(contributions, verdict), int(np.count_nonzero(verdict.shares)))

    return _collecting(settle, weights, judge.least_clients, inner._replace(mixed=by_products))


def coordinatewise(coordinate: Coordinate, weights: str, selection: Judge | None = None) -> Merge:
    """The merge that combines the clients' deltas number by number, of those alone that `selection` leaves."""

    def settle(modules: tuple[ModuleSpec, ...], contributions: Sequence[Contribution]) -> Settled:  # noqa: ARG001
        left = contributions
        if selection:
            verdict = selection.judge(_gram((), contributions), _weights(contributions))
            left = [one for one, share in zip(contributions, verdict.shares, strict=True) if share > 0]
        deltas = [one.update.delta for one in left]
        combined = {key: coordinate.combine(np.stack([d[key] for d in deltas])).astype(np.float32) for key in deltas[0]}
        return Settled(rule(weights, _instead(combined)), left, len(left))

    least = max(coordinate.least_clients, selection.least_clients if selection else 0)
    return _collecting(settle, weights, least, rule(weights)._replace(mixed=False))


def _collecting(settle: Settle, weights: str, least: int, inner: Merge) -> Merge:
    """The merge that waits for all contributions, and has the traits of `inner`, which it ends in."""

    def init(state: ServerState, keys: Collection[str], hidden: Collection[str]) -> _Fold:
        return _Fold(state, keys, hidden, ())

    def add(fold: _Fold, contribution: Contribution) -> _Fold:
        return fold._replace(contributions=(*fold.contributions, contribution))

    def finish(fold: _Fold) -> Merged:
        if not fold.contributions:
            raise FederationError("merge: expected at least one update, found none; check quorum.")
        modules = exactness.measured_modules(fold.state.adapter.spec, fold.hidden)
        settled = settle(modules, fold.contributions)
        inside = settled.merge.init(fold.state, fold.keys, fold.hidden)
        for contribution in settled.contributions:
            inside = settled.merge.add(inside, contribution)
        merged = settled.merge.finish(inside)
        return replace(merged, measures={**merged.measures, "updates_used": float(settled.used)})

    return inner._replace(
        init=init, add=add, finish=finish, weigh=WEIGHTS[weights], reads="each", linear=False, least=least
    )


def _gram(modules: tuple[ModuleSpec, ...], contributions: Sequence[Contribution]) -> np.ndarray:
    deltas = [one.update.delta for one in contributions]
    if not modules:
        return flat_gram(deltas)
    return update_gram(modules, [one.received.tensors for one in contributions], deltas)


def _weights(contributions: Sequence[Contribution]) -> np.ndarray:
    return np.array([one.weight for one in contributions])


def _shared_out(contributions: Sequence[Contribution], verdict: Verdict) -> list[Contribution]:
    """The contributions by the verdict's weights; what a scale takes away stays with what the client received."""
    found = []
    for one, weight, scale in zip(contributions, verdict.weights, verdict.scales, strict=True):
        still = {key: np.zeros_like(value) for key, value in one.update.delta.items()}
        if weight * scale > 0:
            found.append(replace(one, weight=float(weight * scale)))
        if scale < 1:
            found.append(replace(one, update=replace(one.update, delta=still), weight=float(weight * (1 - scale))))
    return found


def _instead(delta: Tensors) -> Callable[[Gathered], Projected]:
    """The projection onto a delta that is known."""
    return lambda gathered: Projected({**gathered.mean, **delta})
