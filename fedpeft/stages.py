"""Stages: what happens to a delta between training and the codec, each with a client and a server half."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from fedpeft.adapters import AdapterSpec, Tensors, norm
from fedpeft.updates import Memory, Update

Names = Callable[[AdapterSpec], tuple[str, ...]]
Client = Callable[[Update, Memory], tuple[Update, Memory]]
Server = Callable[[Tensors], Tensors]

_ROUNDED_DOWN = 1 - 2.0**-22
"""What a factor in float32 is shortened by, so that no rounding makes a product longer than it should be."""


class Stage(NamedTuple):
    """One thing done to updates.

    `frozen(spec)` are the tensors that a client does not train, `local(spec)` those that it trains and keeps.
    `shared(spec)` is the specification of what is left. Client halves run in order, server halves reversed.
    """

    frozen: Names
    local: Names
    shared: Callable[[AdapterSpec], AdapterSpec]
    client: Client
    server: Server


def identity() -> Stage:
    """A stage that changes nothing."""
    return Stage(_none, _none, lambda spec: spec, lambda update, memory: (update, memory), lambda delta: delta)


def freeze(patterns: Sequence[str]) -> Stage:
    """Tensors that match `patterns` are not trained and do not travel back."""
    return identity()._replace(
        frozen=lambda spec: spec.matching(patterns), shared=lambda spec: spec.without(patterns), client=_drop(patterns)
    )


def keep_local(patterns: Sequence[str]) -> Stage:
    """Tensors that match `patterns` are trained and stay with their client, in its memory.

    Source: Arivazhagan et al. 2019, "Federated Learning with Personalization Layers".
    """
    return identity()._replace(
        local=lambda spec: spec.matching(patterns), shared=lambda spec: spec.without(patterns), client=_drop(patterns)
    )


def clip(max_norm: float) -> Stage:
    """The delta as a whole has a Euclidean norm of at most `max_norm`."""

    def client(update: Update, memory: Memory) -> tuple[Update, Memory]:
        size = norm(update.delta)
        if size <= max_norm:
            return update, memory
        factor = np.float32(max_norm / size * _ROUNDED_DOWN)
        clipped = {key: value * factor for key, value in update.delta.items()}
        return replace(update, delta=clipped, metrics={**update.metrics, "clipped": 1.0}), memory

    return identity()._replace(client=client)


def chain(*stages: Stage) -> Stage:
    """The stages one after another, as one stage."""

    def shared(spec: AdapterSpec) -> AdapterSpec:
        for stage in stages:
            spec = stage.shared(spec)
        return spec

    def client(update: Update, memory: Memory) -> tuple[Update, Memory]:
        for stage in stages:
            update, memory = stage.client(update, memory)
        return update, memory

    def server(delta: Tensors) -> Tensors:
        for stage in reversed(stages):
            delta = stage.server(delta)
        return delta

    return Stage(
        lambda spec: tuple(key for stage in stages for key in stage.frozen(spec)),
        lambda spec: tuple(key for stage in stages for key in stage.local(spec)),
        shared,
        client,
        server,
    )


def _none(spec: AdapterSpec) -> tuple[str, ...]:  # noqa: ARG001
    return ()


def _drop(patterns: Sequence[str]) -> Client:
    def client(update: Update, memory: Memory) -> tuple[Update, Memory]:
        spec = update.spec.without(patterns)
        return replace(update, spec=spec, delta={key: update.delta[key] for key in spec.shapes}), memory

    return client
