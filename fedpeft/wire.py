"""What crosses between server and nodes, and the checks at that door.

A packet is a manifest of scalars and one flat array of bytes. Its size is counted here, where it is made, so
that every engine reports the same bytes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import numpy as np

from fedpeft.adapters import AdapterSpec, Tensors, at_rank, greatest_rank, norm
from fedpeft.codecs import dense
from fedpeft.errors import PacketError, sentence
from fedpeft.quarantine import ABSENT
from fedpeft.randomness import rng
from fedpeft.strategy import Strategy
from fedpeft.updates import Update
from fedpeft.version import VERSION

Scalar = bool | int | float | str

MOST_EXAMPLES = 10**9
"""The most examples or tokens that a client may claim."""

_EXACT = dense()

MOST_METRICS = 64
"""The most figures that a reply may carry, and the most characters of a figure's name."""

PHASES = ("receive", "train", "send")
"""What a node's round is made of: to receive the request, to train, and to send the answer to the request before."""

PHASE = "seconds."
"""What the names of figures begin with that say how long a phase took on the node; below 0 where it does not know."""

MOST_FIGURE = 1e100
"""The greatest magnitude of a figure: sums of figures times examples stay finite in float64."""

MOST_MAGNITUDE = 2.0**60
"""The greatest magnitude of a number in an update: squares, and sums of many of them, stay finite in float32."""

_FIGURE = re.compile(r"[A-Za-z0-9_./@%+ -]+", re.ASCII)
_RUN = re.compile(r"[a-z0-9_-]{1,64}", re.ASCII)
_MOST_ROUND = 2**31
_COUNTS = frozenset({"rank", "examples", "tokens"})
_RESERVED = frozenset({"late"})
_METRIC = "metric."


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
        return len(self.body) + 8 * numbers + sum(len(text.encode(errors="surrogatepass")) for text in texts)


@dataclass(frozen=True)
class Failure:
    """Why a node has nothing usable to say; `kind` is one of `fedpeft.quarantine`."""

    reason: str
    kind: str = ABSENT


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
        """Sends each request to its partition and yields what comes back, as it comes, one item a request.

        It may be closed before all have answered.
        """
        ...

    def late(self) -> Iterator[tuple[int, Packet | Failure]]:
        """What has come by now of exchanges that are over, each reply once; does not wait."""
        ...


def encoded(strategy: Strategy, update: Update, manifest: Mapping[str, Scalar]) -> bytes:
    """The update's delta as it travels, rounded by draws that belong to this client and this round."""
    random = rng(strategy.seed, int(manifest["round"]), int(manifest["partition"]), "codec")
    return b"" if update.silent else strategy.codec.encode(update.delta, update.spec, random)


def fit_reply(
    strategy: Strategy, update: Update, manifest: Mapping[str, Scalar], rank: int, body: bytes | None = None
) -> Packet:
    """The packet that carries the update of a client that is at `rank` now; `body` is its delta where that is coded."""
    body = encoded(strategy, update, manifest) if body is None else body
    if strategy.controls:
        body += _EXACT.encode(update.control, update.spec)
    metrics = {f"metric.{key}": float(value) for key, value in update.metrics.items()}
    counts = {"rank": rank, "examples": update.examples, "tokens": update.tokens}
    return Packet("update", {**manifest, **counts, **metrics}, body)


def read_update(packet: Packet, strategy: Strategy, spec: AdapterSpec, expected: Mapping[str, Scalar]) -> Update:
    """The update in a client's reply; `spec` is the adapter that the client was sent, at its rank.

    Raises:
        PacketError: another kind, run, round, partition or digest than expected, a field that is not asked for, a
            rank above the one that was asked for, a payload of the wrong size, a count that is not a positive
            integer, a metric that is not finite, a number above `MOST_MAGNITUDE`.
        AdapterError: numbers that are not finite.
    """
    require_manifest(packet, "update", expected)
    place = f"update of partition {expected['partition']}"
    metrics = read_metrics(packet, place)
    _require_fields(packet, metrics, {*expected, *_COUNTS}, place)
    most = greatest_rank(spec)
    rank = _count(packet.manifest, "rank", place, most, min(1, most) if strategy.pruning else most)
    shared = strategy.stage.shared(at_rank(spec, rank), int(expected["round"]))
    control = _EXACT.size(shared) if strategy.controls else 0
    limit = strategy.codec.size(shared) + control
    if len(packet.body) > limit or len(packet.body) < control:
        raise PacketError(
            sentence(
                place,
                expected=f"at most {limit} bytes, those of {len(shared.shapes)} tensors at rank {rank}",
                found=len(packet.body),
                remedy="use the same adapter settings",
            )
        )
    own = len(packet.body) - control
    silent = strategy.stage.silent and not packet.body
    none = {key: np.zeros(shape, np.float32) for key, shape in shared.shapes.items()}
    delta = none if silent else strategy.codec.decode(packet.body[:own], shared)
    shared.require(delta, place)
    _require_magnitude(delta, place)
    variate = _EXACT.decode(packet.body[own:], shared) if strategy.controls else {}
    if strategy.controls:
        shared.require(variate, f"{place}, control variate")
        _require_magnitude(variate, f"{place}, control variate")
    return Update(
        shared,
        delta,
        examples=_count(packet.manifest, "examples", place, MOST_EXAMPLES),
        tokens=_count(packet.manifest, "tokens", place, MOST_EXAMPLES),
        metrics=metrics,
        control=variate,
        silent=silent,
    )


def read_figures(packet: Packet, expected: Mapping[str, Scalar]) -> Update:
    """What a client says beside an update that travels under masks: an update without a number in it.

    Raises:
        PacketError: as `read_update`.
    """
    place = f"reply of partition {expected['partition']}"
    metrics = read_metrics(packet, place)
    _require_fields(packet, metrics, {*expected, *_COUNTS}, place)
    examples, tokens = (_count(packet.manifest, key, place, MOST_EXAMPLES) for key in ("examples", "tokens"))
    return Update(AdapterSpec("", "", ()), {}, examples, tokens, metrics=metrics)


def read_metrics(packet: Packet, place: str) -> dict[str, float]:
    """The finite figures of a reply, by name.

    Raises:
        PacketError: one is not a finite number, there are too many of them, or a name is too long or not plain.
    """
    metrics = {key.removeprefix(_METRIC): value for key, value in packet.manifest.items() if key.startswith(_METRIC)}
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
        if not _FIGURE.fullmatch(key):
            expected = "names of ASCII letters, digits, spaces and _./@%+-"
            raise PacketError(
                sentence(f"{place}, metrics", expected=expected, found=shown(key), remedy="correct the node")
            )
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= MOST_FIGURE:
            raise PacketError(
                sentence(
                    f"{place}, metric.{key}",
                    expected=f"a finite number of at most {MOST_FIGURE:g}",
                    found=shown(value),
                    remedy="correct the node",
                )
            )
    return {key: float(value) for key, value in metrics.items()}


def shown(value: object) -> str:
    """A peer's value in few characters, however long it is."""
    if isinstance(value, int) and value.bit_length() > 64:
        return f"an integer of {value.bit_length()} bits"
    text = repr(value[:80] if isinstance(value, str | bytes) else value)
    return text if len(text) <= 100 else f"{text[:100]}…"


def require_addressed(packet: Packet) -> None:
    """Raises PacketError unless the packet names a run and a round as a server of ours does."""
    run, round_ = packet.manifest.get("run"), packet.manifest.get("round")
    if not isinstance(run, str) or not _RUN.fullmatch(run):
        expected, found, field_ = "1 to 64 of a-z, 0-9, _ and -", shown(run), "run"
    elif isinstance(round_, bool) or not isinstance(round_, int) or not 0 <= round_ < _MOST_ROUND:
        expected, found, field_ = f"an integer from 0 to {_MOST_ROUND - 1}", shown(round_), "round"
    else:
        return
    raise PacketError(
        sentence(
            f"packet {shown(packet.kind)}, field {field_}",
            expected=expected,
            found=found,
            remedy="run the same version on both sides",
        )
    )


def require_manifest(packet: Packet, kind: str, expected: Mapping[str, Scalar]) -> None:
    """Raises PacketError unless the packet is of `kind` and its manifest agrees with `expected`."""
    found: Mapping[str, Scalar | None] = {"kind": packet.kind, **{key: packet.manifest.get(key) for key in expected}}
    for key, value in {"kind": kind, **expected}.items():
        if type(found[key]) is not type(value) or found[key] != value:
            raise PacketError(
                sentence(
                    f"packet {shown(packet.kind)}, field {key}",
                    expected=repr(value),
                    found=shown(found[key]),
                    remedy="run the same version and settings on both sides",
                )
            )


def require_norm(update: Update, most: float, place: str) -> None:
    """Raises PacketError if the update is longer than `most` (0: no bound)."""
    size = norm(update.delta) if most else 0.0
    if size > most:
        raise PacketError(
            sentence(
                place,
                expected=f"a norm of at most {most:g}",
                found=f"{size:g}",
                remedy="clip or lower the learning rate",
            )
        )


def require_examples(update: Update, most: int, place: str) -> None:
    """Raises PacketError if the update claims more examples than `most` (0: no bound).

    What a client says of its rows weighs its update and cannot be checked, so its bound is for the operator to know.
    """
    if most and update.examples > most:
        raise PacketError(
            sentence(
                f"{place}, examples",
                expected=f"at most {most}",
                found=update.examples,
                remedy="correct the node, or raise federation.most_examples",
            )
        )


def _require_fields(packet: Packet, metrics: Mapping[str, float], asked: set[str], place: str) -> None:
    """Nothing is in the manifest that was not asked for, and no figure is named like a mark of the server's own."""
    odd = [key for key in packet.manifest if key not in asked and not key.startswith(_METRIC)]
    odd += [f"{_METRIC}{key}" for key in metrics if key in _RESERVED]
    if odd:
        raise PacketError(
            sentence(
                place,
                expected="the fields of an update and its metrics alone",
                found=f"{len(odd)} more, such as {shown(odd[0])}",
                remedy="run the same version on both sides",
            )
        )


def _require_magnitude(tensors: Tensors, place: str) -> None:
    for key, value in tensors.items():
        if value.size and max(float(value.max()), -float(value.min())) > MOST_MAGNITUDE:
            raise PacketError(
                sentence(
                    f"{place}, tensor {key}",
                    expected=f"numbers of at most {MOST_MAGNITUDE:g}",
                    found="greater ones",
                    remedy="lower the learning rate or clip the update",
                )
            )


def _count(manifest: Mapping[str, Scalar], key: str, place: str, most: int, least: int = 1) -> int:
    value = manifest.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise PacketError(
            sentence(
                f"{place}, {key}",
                expected=f"an integer from {least} to {most}",
                found=shown(value),
                remedy="correct the node",
            )
        )
    return value
