"""Stages: what happens to a delta between training and the codec, each with a client and a server half."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from fedpeft.adapters import AdapterSpec, Tensors, norm
from fedpeft.updates import Memory, Update

Names = Callable[[AdapterSpec, int], tuple[str, ...]]
Client = Callable[[Update, Memory], tuple[Update, Memory]]
Server = Callable[[Tensors], Tensors]

_ROUNDED_DOWN = 1 - 2.0**-22
"""What a factor in float32 is shortened by, so that no rounding makes a product longer than it should be."""


class Stage(NamedTuple):
    """One thing done to updates.

    `frozen(spec, round)` are the tensors that a client does not train in that round, `local(spec, round)` those
    that it trains and keeps; neither travels back. Client halves run in order, server halves reversed.
    """

    frozen: Names
    local: Names
    client: Client
    server: Server

    def shared(self, spec: AdapterSpec, round_: int) -> AdapterSpec:
        """The specification of what travels back after round `round_`."""
        kept = {*self.frozen(spec, round_), *self.local(spec, round_)}
        return spec.only(key for key in spec.shapes if key not in kept)

    def constant(self, spec: AdapterSpec) -> tuple[str, ...]:
        """The tensors that are never trained; stages alternate with a period of two at most."""
        return tuple(key for key in self.frozen(spec, 1) if key in self.frozen(spec, 2))

    def trained(self, spec: AdapterSpec) -> AdapterSpec:
        """The specification of what is trained in some round."""
        constant = set(self.constant(spec))
        return spec.only(key for key in spec.shapes if key not in constant)


def identity() -> Stage:
    """A stage that changes nothing."""
    return Stage(_none, _none, lambda update, memory: (update, memory), lambda delta: delta)


def freeze(patterns: Sequence[str]) -> Stage:
    """Tensors that match `patterns` are not trained."""
    return identity()._replace(frozen=lambda spec, round_: spec.matching(patterns))  # noqa: ARG005


def alternate(odd: Sequence[str], even: Sequence[str]) -> Stage:
    """Tensors that match `odd` are not trained in odd rounds, nor those that match `even` in even ones."""
    return identity()._replace(frozen=lambda spec, round_: spec.matching(odd if round_ % 2 else even))


def keep_local(patterns: Sequence[str]) -> Stage:
    """Tensors that match `patterns` are trained and stay with their client, in its memory.

    Source: Arivazhagan et al. 2019, "Federated Learning with Personalization Layers".
    """
    return identity()._replace(local=lambda spec, round_: spec.matching(patterns))  # noqa: ARG005


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

    def client(update: Update, memory: Memory) -> tuple[Update, Memory]:
        for stage in stages:
            update, memory = stage.client(update, memory)
        return update, memory

    def server(delta: Tensors) -> Tensors:
        for stage in reversed(stages):
            delta = stage.server(delta)
        return delta

    return Stage(
        lambda spec, round_: tuple(key for stage in stages for key in stage.frozen(spec, round_)),
        lambda spec, round_: tuple(key for stage in stages for key in stage.local(spec, round_)),
        client,
        server,
    )


def _none(spec: AdapterSpec, round_: int) -> tuple[str, ...]:  # noqa: ARG001
    return ()
