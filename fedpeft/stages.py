"""Stages: what happens to a delta between training and the codec, each with a client and a server half."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from fedpeft.adapters import AdapterSpec, Tensors, fit, norm
from fedpeft.updates import Memory, Update

Names = Callable[[AdapterSpec, int], tuple[str, ...]]
Client = Callable[[Update, Memory], tuple[Update, Memory]]
Server = Callable[[Tensors], Tensors]

UNSAID = "unsaid/"
"""What a memory's keys begin with where it keeps what the client has learned and not said."""

_ROUNDED_DOWN = 1 - 2.0**-22
"""What a factor in float32 is shortened by, so that no rounding makes a product longer than it should be."""


class Stage(NamedTuple):
    """One thing done to updates.

    `frozen(spec, round)` are the tensors that a client does not train in that round, `local(spec, round)` those
    that it trains and keeps; neither travels back. Client halves run in order, server halves reversed. What is frozen
    repeats every `period` rounds, in which layers take `turns`; where it may be `silent`, a client may say nothing.
    """

    frozen: Names
    local: Names
    client: Client
    server: Server
    period: int = 1
    turns: int = 1
    silent: bool = False

    def shared(self, spec: AdapterSpec, round_: int) -> AdapterSpec:
        """The specification of what travels back after round `round_`."""
        kept = {*self.frozen(spec, round_), *self.local(spec, round_)}
        return spec.only(key for key in spec.shapes if key not in kept)

    def constant(self, spec: AdapterSpec) -> tuple[str, ...]:
        """The tensors that are never trained."""
        others = [set(self.frozen(spec, round_)) for round_ in range(2, self.period + 1)]
        return tuple(key for key in self.frozen(spec, 1) if all(key in frozen for frozen in others))

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
    return identity()._replace(frozen=lambda spec, round_: spec.matching(odd if round_ % 2 else even), period=2)


def take_turns(groups: int) -> Stage:
    """In round r only every `groups`-th layer is trained, from layer (r - 1) mod `groups` on; no other has a delta.

    Layers are those of `layers_of`. What is in no layer, such as a head, is trained in every round.
    """

    def frozen(spec: AdapterSpec, round_: int) -> tuple[str, ...]:
        waiting = {layer for at, layer in enumerate(layers_of(spec)) if (at - round_ + 1) % groups}
        return tuple(key for key in spec.shapes if _layer(key) in waiting)

    return identity()._replace(frozen=frozen, period=groups, turns=groups)


def layers_of(spec: AdapterSpec) -> tuple[str, ...]:
    """The numbered layers that the adapter is on, as paths up to the number, in order of stack and number."""
    found = {layer for key in spec.shapes if (layer := _layer(key))}
    return tuple(sorted(found, key=lambda layer: (layer.rpartition(".")[0], int(layer.rpartition(".")[2]))))


def keep_silent(below: float, most: int) -> Stage:
    """A client whose update is shorter than `below` times its usual one says nothing, `most` times in a row at most.

    The usual length is a decaying mean of those that its training came to in the rounds before, by half each time. What
    is not said is kept in memory, added to the next update before that is measured, and sent with it; so what a client
    has said and what it keeps are at every moment the sum of all that it has learned. A silent client still takes part
    in the mean, with a delta of zero: were it absent, the others' share would grow now, and its own come later still.

    Source: Chen et al. 2018, "LAG: Lazily Aggregated Gradient for Communication-Efficient Distributed Learning", where
    a worker is silent whose gradient has changed little and the server goes on with its last one; here nothing is used
    twice, and what is left out is carried over as in Seide et al. 2014, "1-Bit Stochastic Gradient Descent" (error
    feedback).
    """

    def client(update: Update, memory: Memory) -> tuple[Update, Memory]:
        usual, silent = float(memory.fields.get("usual_norm", 0.0)), int(memory.fields.get("silent", 0))
        fresh = norm(update.delta)
        delta = {key: value + _unsaid(memory, key, value.shape) for key, value in update.delta.items()}
        says_nothing = silent < most and norm(delta) < below * usual
        said = {f"{UNSAID}{key}" for key in delta}
        kept = {key: value for key, value in memory.tensors.items() if key not in said}
        if says_nothing:
            kept |= {f"{UNSAID}{key}": value for key, value in delta.items()}
        fields = {
            **memory.fields,
            "usual_norm": (usual + fresh) / 2 if usual else fresh,
            "silent": silent + 1 if says_nothing else 0,
        }
        if says_nothing:
            delta = {key: np.zeros_like(value) for key, value in delta.items()}
            update = replace(update, silent=True, metrics={**update.metrics, "silent": 1.0})
        return replace(update, delta=delta), Memory(kept, fields)

    return identity()._replace(client=client, silent=True)


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
        math.lcm(*(stage.period for stage in stages)),
        math.prod(stage.turns for stage in stages),
        any(stage.silent for stage in stages),
    )


def _none(spec: AdapterSpec, round_: int) -> tuple[str, ...]:  # noqa: ARG001
    return ()


def _layer(key: str) -> str:
    """The path of the numbered layer that a tensor is in, the outermost; empty where it is in none."""
    parts = key.split(".")
    at = next((at for at, part in enumerate(parts) if part.isdecimal()), None)
    return "" if at is None else ".".join(parts[: at + 1])


def _unsaid(memory: Memory, key: str, shape: tuple[int, ...]) -> np.ndarray:
    """What the client has not said of a tensor, in the rows and columns that it has now."""
    held = memory.tensors.get(f"{UNSAID}{key}")
    return np.zeros(shape, np.float32) if held is None else fit(held, shape)
