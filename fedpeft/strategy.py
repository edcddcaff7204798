"""A federated algorithm as plain functions, and the law of what may go with what."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from fedpeft.adapters import AdapterSpec, AdapterState, Tensors, norm
from fedpeft.codecs import Codec
from fedpeft.errors import AdapterError, FederationError, PlanError
from fedpeft.merges import Merge, exactness
from fedpeft.optimizers import Optimizer
from fedpeft.stages import Stage
from fedpeft.updates import ServerState, Update

Measures = Mapping[str, float | Mapping[str, float]]
"""Figures of one round for the journal, by name; some by module."""


class Strategy(NamedTuple):
    """What the server does with a round, and the parts that clients share with it.

    `init(run, seed, adapter)` is the state before round 1. `aggregate(state, updates)` is the state after a
    round and figures about it; updates are taken one by one, as they come, and a result that is not finite is
    a FederationError. `finalize(state)` is the adapter that a user deploys. `stage` and `codec` are the halves
    that clients run too.
    """

    stage: Stage
    codec: Codec
    init: Callable[[str, int, AdapterState], ServerState]
    aggregate: Callable[[ServerState, Iterable[Update]], tuple[ServerState, Measures]]
    finalize: Callable[[ServerState], AdapterState]


class Law(NamedTuple):
    """A reason why a plan cannot run: `broken(stage, codec, merge, spec)` is the sentence, or empty."""

    name: str
    broken: Callable[[Stage, Codec, Merge, AdapterSpec], str]


def build(stage: Stage, codec: Codec, merge: Merge, optimizer: Optimizer) -> Strategy:
    """The strategy that merges what `stage` lets through and moves the adapter with `optimizer`."""

    def init(run: str, seed: int, adapter: AdapterState) -> ServerState:
        return ServerState(
            run=run, round=0, seed=seed, adapter=adapter, optimizer=optimizer.init(stage.shared(adapter.spec))
        )

    def aggregate(state: ServerState, updates: Iterable[Update]) -> tuple[ServerState, Measures]:
        before, spec = state.adapter.tensors, state.adapter.spec
        fold, target = merge.init(stage.shared(spec)), exactness.begin()
        modules = exactness.measured_modules(spec, stage.local(spec))
        for update in updates:
            fold = merge.add(fold, update)
            target = exactness.add(target, modules, before, update.delta, merge.weigh(update))
        delta, measures = merge.finish(fold)
        errors = exactness.errors(target, before, delta)
        delta = stage.server(delta)
        with np.errstate(over="ignore"):  # an adapter beyond float32 is refused below, in words
            moments, tensors = optimizer.apply(state.optimizer, before, delta)
        _require_finite(spec, tensors, state.round + 1)
        adapter = replace(state.adapter, tensors=tensors)
        after = replace(state, round=state.round + 1, adapter=adapter, optimizer=moments)
        found: Measures = {"merge_error": errors.overall, "merge_errors": errors.by_module} if modules else {}
        return after, {"update_norm": norm(delta), **measures, **found}

    return Strategy(stage, codec, init, aggregate, lambda state: state.adapter)


def _require_finite(spec: AdapterSpec, tensors: Tensors, round_: int) -> None:
    try:
        spec.require(tensors, f"adapter after round {round_}")
    except AdapterError as error:  # nobody's mistake in what was asked: the run itself has failed
        raise FederationError(str(error)) from error


def check(stage: Stage, codec: Codec, merge: Merge, spec: AdapterSpec) -> None:
    """Raises PlanError, naming the two choices that clash, if the plan breaks one of `LAWS`."""
    for law in LAWS:
        reason = law.broken(stage, codec, merge, spec)
        if reason:
            raise PlanError(reason)


def _frozen_and_local(stage: Stage, codec: Codec, merge: Merge, spec: AdapterSpec) -> str:  # noqa: ARG001
    both = sorted(set(stage.frozen(spec)) & set(stage.local(spec)))
    if not both:
        return ""
    return (
        f"aggregation.stages: expected each tensor either frozen or local, found {both[0]} in both; "
        "a frozen tensor is not trained, so drop it from one of the two lists."
    )


def _nothing_trained(stage: Stage, codec: Codec, merge: Merge, spec: AdapterSpec) -> str:  # noqa: ARG001
    if set(stage.frozen(spec)) != set(spec.shapes):
        return ""
    return "aggregation.stages.frozen: expected some tensor left to train, found all frozen; shorten the list."


def _nothing_shared(stage: Stage, codec: Codec, merge: Merge, spec: AdapterSpec) -> str:  # noqa: ARG001
    if stage.shared(spec).shapes:
        return ""
    return (
        "aggregation.stages: expected some tensor left to share, found every one frozen or local; "
        "shorten the lists, or train each site alone."
    )


LAWS = (
    Law("a tensor is frozen or local, never both", _frozen_and_local),
    Law("something is trained", _nothing_trained),
    Law("something is shared", _nothing_shared),
)
"""Every reason why a plan is refused before its first round."""
