"""What crosses between server and nodes, and the checks at that door.

A packet is a manifest of scalars and one flat array of bytes. Its size is counted here, where it is made, so
that every engine reports the same bytes.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

from fedpeft.adapters import AdapterSpec, AdapterState
from fedpeft.errors import PacketError, sentence
from fedpeft.strategy import Strategy
from fedpeft.updates import ServerState, Update
from fedpeft.version import VERSION

Scalar = bool | int | float | str

MOST_EXAMPLES = 10**9
"""The most examples or tokens that a client may claim."""

MOST_METRICS = 64
"""The most figures that a reply may carry, and the most characters of a figure's name."""


@dataclass(frozen=True)
class Packet:
    """One message: its kind, a manifest of scalars, and the payload."""

    kind: str
    manifest: Mapping[str, Scalar] = field(default_factory=dict)
    body: bytes = b""

    @cached_property
    def size_bytes(self) -> int:
        """Bytes of payload and manifest, a number counted as 8 and a text as its UTF-8."""
        texts = [self.kind, *self.manifest, *(value for value in self.manifest.values() if isinstance(value, str))]
        numbers = sum(not isinstance(value, str) for value in self.manifest.values())
        return len(self.body) + 8 * numbers + sum(len(text.encode()) for text in texts)


@dataclass(frozen=True)
class Failure:
    """Why a node has nothing usable to say."""

    reason: str


@dataclass(frozen=True)
class Session:
    """What both ends of a run must agree on: the run's name, the digests of its settings and of the adapter."""

    run: str
    config: str
    spec: str

    def manifest(self, round_: int) -> dict[str, Scalar]:
        """The fields that every packet of round `round_` carries."""
        return {"version": VERSION, "run": self.run, "config": self.config, "spec": self.spec, "round": round_}


class Transport(Protocol):
    """How the server reaches the nodes; nodes are known by their partition, an int from 0."""

    def partitions(self) -> tuple[int, ...]:
        """The partitions whose nodes can be reached now, in order."""
        ...

    def exchange(
        self, requests: Mapping[int, Packet], timeout_seconds: float
    ) -> Iterator[tuple[int, Packet | Failure]]:
        """Sends each request to its partition and yields what comes back, as it comes, one item a request."""
        ...


def fit_request(strategy: Strategy, state: ServerState, session: Session) -> Packet:
    """The packet that asks a client to train from `state` in the round after it."""
    body = strategy.codec.encode(state.adapter.tensors, state.adapter.spec)
    return Packet("fit", session.manifest(state.round + 1), body)


def evaluate_request(strategy: Strategy, state: ServerState, session: Session) -> Packet:
    """The packet that asks a client to score `state`'s adapter on its own rows."""
    body = strategy.codec.encode(state.adapter.tensors, state.adapter.spec)
    return Packet("evaluate", session.manifest(state.round), body)


def read_adapter(packet: Packet, strategy: Strategy, spec: AdapterSpec) -> AdapterState:
    """The adapter that a request carries, checked against `spec`."""
    tensors = strategy.codec.decode(packet.body, spec)
    spec.require(tensors, f"{packet.kind} request")
    return AdapterState(spec, tensors)


def fit_reply(strategy: Strategy, update: Update, manifest: Mapping[str, Scalar]) -> Packet:
    """The packet that carries a client's update."""
    body = strategy.codec.encode(update.delta, update.spec)
    metrics = {f"metric.{key}": float(value) for key, value in update.metrics.items()}
    return Packet("update", {**manifest, "examples": update.examples, "tokens": update.tokens, **metrics}, body)


def read_update(packet: Packet, strategy: Strategy, spec: AdapterSpec, expected: Mapping[str, Scalar]) -> Update:
    """The update in a client's reply; `spec` is what the client was to send.

    Raises:
        PacketError: another kind, run, round, partition or digest than expected, a payload of the wrong size,
            a count that is not a positive integer, a metric that is not finite.
        AdapterError: numbers that are not finite.
    """
    require_manifest(packet, "update", expected)
    place = f"update of partition {expected['partition']}"
    limit = strategy.codec.size(spec)
    if len(packet.body) > limit:
        raise PacketError(
            sentence(
                place, expected=f"at most {limit} bytes", found=len(packet.body), remedy="use the same adapter settings"
            )
        )
    delta = strategy.codec.decode(packet.body, spec)
    spec.require(delta, place)
    return Update(
        spec,
        delta,
        examples=_count(packet.manifest, "examples", place),
        tokens=_count(packet.manifest, "tokens", place),
        metrics=read_metrics(packet, place),
    )


def read_metrics(packet: Packet, place: str) -> dict[str, float]:
    """The finite figures of a reply, by name.

    Raises:
        PacketError: one is not a finite number, there are too many of them, or a name is too long.
    """
    named = ((key.partition("metric."), value) for key, value in packet.manifest.items())
    metrics = {name: value for (before, mark, name), value in named if mark and not before}
    longest = max(map(len, metrics), default=0)
    if max(len(metrics), longest) > MOST_METRICS:
        raise PacketError(
            sentence(
                place,
                expected=f"at most {MOST_METRICS} metrics with names of at most {MOST_METRICS} characters",
                found=f"{len(metrics)} with names of up to {longest}",
                remedy="correct the node",
            )
        )
    for key, value in metrics.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= sys.float_info.max:
            raise PacketError(
                sentence(
                    f"{place}, metric.{key}", expected="a finite number", found=repr(value), remedy="correct the node"
                )
            )
    return {key: float(value) for key, value in metrics.items()}


def require_manifest(packet: Packet, kind: str, expected: Mapping[str, Scalar]) -> None:
    """Raises PacketError unless the packet is of `kind` and its manifest agrees with `expected`."""
    found: Mapping[str, Scalar | None] = {"kind": packet.kind, **{key: packet.manifest.get(key) for key in expected}}
    for key, value in {"kind": kind, **expected}.items():
        if found[key] != value or isinstance(found[key], bool) != isinstance(value, bool):
            raise PacketError(
                sentence(
                    f"packet {packet.kind!r}, field {key}",
                    expected=repr(value),
                    found=repr(found[key]),
                    remedy="run the same version and settings on both sides",
                )
            )


def _count(manifest: Mapping[str, Scalar], key: str, place: str) -> int:
    value = manifest.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= MOST_EXAMPLES:
        raise PacketError(
            sentence(
                f"{place}, {key}",
                expected=f"an integer from 1 to {MOST_EXAMPLES}",
                found=repr(value),
                remedy="correct the node",
            )
        )
    return value
