"""A federated algorithm as plain functions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from fedpeft import residuals
from fedpeft.adapters import AdapterSpec, AdapterState, Tensors, absorbed, at_ranks, fit, fixed, norm, ranks_of, resized
from fedpeft.codecs import Codec, as_sent, dense, first_sent, next_sent
from fedpeft.errors import AdapterError, FederationError
from fedpeft.merges import Contribution, Merged, Method, Passes, Pruning
from fedpeft.optimizers import Optimizer
from fedpeft.privacy import Channel, Mechanism
from fedpeft.stages import Stage, alternate, chain, freeze, identity, keep_local
from fedpeft.updates import Privacy, ServerState, Update

Measures = Mapping[str, float | Mapping[str, float]]
"""Figures of one round for the journal, by name; some by module."""


@dataclass(frozen=True)
class Parts:
    """What a strategy is put together from.

    `controls` is how many clients there are in all, where they keep control variates (SCAFFOLD), else 0. `mechanism`
    is how the run protects (None: not), `channel` how the server sees sums alone (None: it sees each update). `seed` is
    the run's, `downlink` the codec of what the server sends. With `builds` nodes build for themselves what nobody has
    trained yet.
    """

    stage: Stage
    codec: Codec
    method: Method
    optimizer: Optimizer
    controls: int = 0
    mechanism: Mechanism | None = None
    channel: Channel | None = None
    seed: int = 0
    downlink: Codec = field(default_factory=dense)
    builds: bool = False


class Strategy(NamedTuple):
    """What the server does with a round, and the parts that clients share with it.

    `init(run, seed, adapter)` is the state before round 1. `aggregate(state, updates)` is the state after a
    round and figures about it; updates are taken one by one, as they come, and a result that is not finite is
    a FederationError. `finalize(state)` is the adapter that a user deploys, with what went into the base. `stage`
    and `codec`, that of updates, are the halves that clients run too; `pruning` is how they lower their rank, if they
    do; `controls`: clients keep control variates (SCAFFOLD). `mechanism` is how the run protects, and what a round of
    it costs; with a `channel` the server sees but sums of updates. `seed` is what clients' rounding is drawn from.
    `downlink` is the codec of what the server sends, of the tensors of `travelling(spec)`. Where a channel's sums are
    of products, `sketch` is the width of their sketch. With `builds` nodes build for themselves what nobody has trained
    yet.
    """

    stage: Stage
    codec: Codec
    init: Callable[[str, int, AdapterState], ServerState]
    aggregate: Callable[[ServerState, Iterable[Update]], tuple[ServerState, Measures]]
    finalize: Callable[[ServerState], AdapterState]
    pruning: Pruning | None = None
    controls: bool = False
    mechanism: Mechanism | None = None
    channel: Channel | None = None
    seed: int = 0
    downlink: Codec = dense()
    sketch: int | None = None
    builds: bool = False

    def travelling(self, spec: AdapterSpec) -> AdapterSpec:
        """What of the adapter goes down to a node that has what never changes, and what is its own."""
        return _travelling(self.stage, spec)

    def passes(self, spec: AdapterSpec, round_: int) -> Passes | None:
        """How the products of round `round_` are summed, of adapters of `spec`; None where their numbers are."""
        if self.sketch is None:
            return None
        return Passes(self.stage.shared(spec, round_), self.sketch, self.seed, round_)


def build(parts: Parts) -> Strategy:
    """The strategy that merges what the stage lets through and moves the adapter with the optimiser."""
    private = parts.mechanism
    stage = chain(stage_of(parts.method), parts.stage, private.stage if private else identity())
    merge, optimizer, budget = parts.method.merge, parts.optimizer, parts.method.budget
    merge = private.wrap(merge) if private else merge
    sketch = parts.method.sketch if parts.channel else None

    def init(run: str, seed: int, adapter: AdapterState) -> ServerState:
        kept = {*stage.constant(adapter.spec), *stage.local(adapter.spec, 1)}
        moments = optimizer.init(adapter.spec.only(key for key in adapter.spec.shapes if key not in kept))
        zeros = {key: np.zeros(shape, np.float32) for key, shape in adapter.spec.shapes.items() if key not in kept}
        control = zeros if parts.controls else {}
        down = first_sent(parts.downlink, adapter.tensors, _travelling(stage, adapter.spec))
        return ServerState(run, 0, seed, adapter, optimizer=moments, control=control, sent=down)

    def aggregate(state: ServerState, updates: Iterable[Update]) -> tuple[ServerState, Measures]:
        before, spec, round_ = state.adapter.tensors, state.adapter.spec, state.round + 1
        # Of a sum nobody can say how far the mean of products is from the product of means, so nothing is measured.
        hidden = tuple(spec.shapes) if parts.channel and sketch is None else stage.local(spec, round_)
        base = as_sent(state)
        fold = merge.init(replace(state, adapter=base), tuple(stage.shared(spec, round_).shapes), hidden)
        control = dict(state.control)
        for update in updates:
            for key, change in update.control.items():  # Karimireddy et al. 2020, "SCAFFOLD", algorithm 1, line 17
                with np.errstate(over="ignore"):
                    control[key] = control[key] + fit(change, control[key].shape) / np.float32(parts.controls)
            received = sent(base, update.spec)
            fold = merge.add(fold, Contribution(update, received, update.share * merge.weigh(update)))
        with np.errstate(over="ignore", invalid="ignore"):
            merged = merge.finish(fold)
        delta = stage.server(merged.delta)
        _require_finite(spec.only(control), control, round_)
        with np.errstate(over="ignore"):  # an adapter beyond float32 is refused below, in words
            moments, tensors = optimizer.apply(state.optimizer, before, delta)
        _require_finite(spec, tensors, round_)
        moved = replace(
            state,
            round=round_,
            adapter=replace(state.adapter, tensors=tensors),
            optimizer=moments,
            control=control,
            privacy=_charged(merged.privacy or state.privacy, private, round_),
        )
        after, figures = _take_up(moved, merged, budget)
        after = replace(after, sent=next_sent(parts.downlink, state.sent, after, _travelling(stage, spec)))
        return after, {"update_norm": norm(delta), **merged.measures, **figures}

    return Strategy(
        stage,
        parts.codec,
        init,
        aggregate,
        lambda state: absorbed(state.adapter),
        parts.method.pruning,
        parts.controls > 0,
        private,
        parts.channel,
        parts.seed,
        parts.downlink,
        sketch,
        parts.builds,
    )


def _travelling(stage: Stage, spec: AdapterSpec) -> AdapterSpec:
    kept = {*stage.constant(spec), *stage.local(spec, 1)}
    return spec.only(key for key in spec.shapes if key not in kept)


def sent(adapter: AdapterState, like: AdapterSpec) -> AdapterState:
    """The adapter as a node holds it whose low-rank modules have the ranks of `like`, without the residual."""
    spec = at_ranks(adapter.spec, ranks_of(like))
    return AdapterState(spec, resized(adapter.tensors, spec))


def stage_of(method: Method) -> Stage:
    """What a method leaves untrained, or at its site."""
    return chain(
        identity()._replace(frozen=lambda spec, round_: fixed(spec)),  # noqa: ARG005
        freeze(method.frozen) if method.frozen else identity(),
        keep_local(method.local) if method.local else identity(),
        alternate(method.alternating[1:], method.alternating[:1]) if method.alternating else identity(),
    )


def _charged(privacy: Privacy, mechanism: Mechanism | None, round_: int) -> Privacy:
    """What is spent after round `round_`."""
    spent = mechanism.charge(round_) if mechanism else None
    return replace(privacy, history=(*privacy.history, spent)) if spent else privacy


def _take_up(state: ServerState, merged: Merged, budget: int) -> tuple[ServerState, Measures]:
    """The state whose base has taken up the merge's residual, and figures about that."""
    if not merged.residual:
        return state, {}
    grown = residuals.grow(state.adapter, state.drift, state.round, merged.residual, budget)
    _require_finite(
        residuals.specification(state.adapter.spec, residuals.ranks_of(grown.adapter.residual)),
        grown.adapter.residual,
        state.round,
    )
    figures = {
        "residual_rank": float(max(residuals.ranks_of(grown.adapter.residual), default=0)),
        "residual_dropped": grown.dropped,
    }
    return replace(state, adapter=grown.adapter, drift=grown.drift), figures


def _require_finite(spec: AdapterSpec, tensors: Tensors, round_: int) -> None:
    try:
        spec.require(tensors, f"adapter after round {round_}")
    except AdapterError as error:  # nobody's mistake in what was asked: the run itself has failed
        raise FederationError(str(error)) from error
