"""Messages that are valid but for one to four changes, as a broken or hostile peer might send them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from fedpeft.adapters import AdapterSpec, AdapterState, ModuleSpec
from fedpeft.codecs import coded, dense, steps, top_k, zstd
from fedpeft.engines.flower_messages import STYPE, to_packet, to_records
from fedpeft.merges import Method, rule
from fedpeft.optimizers import sgd
from fedpeft.requests import fit_request, read_request
from fedpeft.stages import identity
from fedpeft.strategy import Parts, build
from fedpeft.updates import Memory, ServerState, Update
from fedpeft.wire import Packet, Session, fit_reply, read_update, require_addressed, require_manifest, require_norm

Draw = Callable[[int], int]
"""`draw(n)` is one of 0 to n - 1."""

SPEC = AdapterSpec(
    "base",
    "lora",
    (
        ModuleSpec("head", "full", 0, 1.0, (("weight", (3,)),)),
        ModuleSpec("layer", "lora", 4, 2.0, (("A", (4, 7)), ("B", (6, 4)))),
    ),
)
_SESSION = Session("run-1", "c0ffee", SPEC.digest)
_STRATEGY = build(Parts(identity(), dense(), Method(rule("examples")), sgd(1.0)))
_CODED = build(
    Parts(identity(), coded(top_k(0.5), steps(15, 8, "nearest"), zstd(3)), Method(rule("examples")), sgd(1.0))
)
_BUILT = build(Parts(identity(), dense(), Method(rule("examples")), sgd(1.0), builds=True))
_TENSORS = {key: np.ones(shape, np.float32) for key, shape in SPEC.shapes.items()}
_EXPECTED = {**_SESSION.manifest(1), "partition": 0}
_FIRST = AdapterState(SPEC, _TENSORS)
_UPDATE = Update(SPEC, _TENSORS, 10, 100, metrics={"loss": 1.0, "seconds": 2.0})
VALID: tuple[Packet, ...] = (
    fit_reply(_STRATEGY, _UPDATE, _EXPECTED, 4),
    fit_request(_STRATEGY, ServerState("run-1", 0, 0, _FIRST), _SESSION, 0, 4),
    fit_reply(_CODED, _UPDATE, _EXPECTED, 4),
    fit_request(_BUILT, ServerState("run-1", 0, 0, _FIRST), _SESSION, 0, 4),
)
MOST_NORM = 100.0

_NUMBERS = (0, 1, -1, 2, 4, 5, True, False, 2**31, 2**63 - 1, -(2**63), 2**64, 2**200, 10**5000, 10**9, 10**9 + 1)
_FLOATS = (0.0, -0.0, 1.0, 0.5, float("nan"), float("inf"), -float("inf"), 5e-324, 1.7e308, 1e100, -1e101, 2.0**53)
_TEXTS = (
    "",
    "update",
    "fit",
    "run-1",
    "run-2",
    "../../etc/passwd",
    "\ud800",
    "\x00",
    "\x1b[2J",
    "x" * 70_000,
    "9" * 5000,
    "1,2",
    "-1",
    "99999999999999999999",
    "\u0661",
    ",,,",
    "🦀" * 50,
)
_VALUES = (*_NUMBERS, *_FLOATS, *_TEXTS, b"bytes", [1, 2], [0.5], ["a"], [True])
_KEYS = (
    "kind",
    *(f"manifest.{key}" for packet in VALID for key in packet.manifest),
    *(f"manifest.{key}" for key in ("metric.late", "metric.\ud800", "metric.a\nb", "reason", "residual.to")),
    *(f"manifest.{key}" for key in ("residual.from", "residual.epoch", "", "metric.", "delta.layer.A", "known")),
    "manifest",
    "\ud800",
    "x" * 300,
    "",
)
_DTYPES = ("uint8", "float32", "object", "|O", "", "u1", "\ud800")
_SIZES = (0, 1, 3, 4, 220, 2**31, 2**40, 2**63, -1, 10**5000)
_FLOAT_BITS = (0x7FC00000, 0x7F800000, 0xFF800000, 0x7F7FFFFF, 0x80000000, 0x00000001, 0x5D800000, 0x5D800001)


def mutated(draw: Draw) -> tuple[int, RecordDict]:
    """Which of `VALID` was taken, and the message it makes after some changes."""
    which = draw(len(VALID))
    records = to_records(VALID[which])
    for _ in range(1 + draw(4)):
        _CHANGES[draw(len(_CHANGES))](draw, records)
    return which, records


def receive(which: int, records: RecordDict) -> None:
    """What the server does with a reply (0), or a coded one (2), and a node with a request (1).

    A request may be without the adapter, which the node builds for itself (3).

    Raises:
        FedPeftError: the message is not what it should be.
    """
    packet = to_packet(records)
    if which % 2 == 0:
        update = read_update(packet, _CODED if which else _STRATEGY, SPEC, _EXPECTED)
        require_norm(update, MOST_NORM, "update")
        packet.size_bytes  # noqa: B018
        _require_sane(update)
        return
    require_addressed(packet)
    own = {key: VALID[1].manifest[key] for key in ("version", "config", "spec")}
    require_manifest(packet, packet.kind, own)
    read_request(packet, _BUILT if which == 3 else _STRATEGY, SPEC, Memory(), lambda: _FIRST)


def _require_sane(update: Update) -> None:
    """Raises ValueError where something was let through that must not be."""
    finite = all(np.isfinite(value).all() for value in update.delta.values())
    if not finite or not 1 <= update.examples <= 10**9 or update.spec.parameters > SPEC.parameters:
        raise ValueError("an update was used that should have been refused")


def _set_value(draw: Draw, records: RecordDict) -> None:
    record = records.get("packet")
    if isinstance(record, ConfigRecord) and len(record):
        record[sorted(record)[draw(len(record))]] = _VALUES[draw(len(_VALUES))]


def _add_key(draw: Draw, records: RecordDict) -> None:
    record = records.get("packet")
    if isinstance(record, ConfigRecord):
        record[_KEYS[draw(len(_KEYS))]] = _VALUES[draw(len(_VALUES))]


def _drop_key(draw: Draw, records: RecordDict) -> None:
    record = records.get("packet")
    if isinstance(record, ConfigRecord) and len(record):
        del record[sorted(record)[draw(len(record))]]


def _flood(draw: Draw, records: RecordDict) -> None:
    record = records.get("packet")
    if isinstance(record, ConfigRecord):
        for number in range((10, 70, 300)[draw(3)]):
            record[f"manifest.metric.m{number}"] = 1.0


def _change_record(draw: Draw, records: RecordDict) -> None:
    name = ("packet", "payload", "settings", "more", "\ud800")[draw(5)]
    records.pop(name, None)
    if draw(3):
        records[name] = (ConfigRecord({}), ArrayRecord({}), MetricRecord({"a": 1}))[draw(3)]


def _change_array(draw: Draw, records: RecordDict) -> None:
    data = _data(records)
    size = _SIZES[draw(len(_SIZES))]
    shape: tuple[Any, ...] = ((len(data),), (size,), (), (size, size), (1,) * 40, (float(len(data)),), (True,))[draw(7)]
    stype = (STYPE, "numpy.ndarray", "", "pickle")[draw(4)]
    record = ArrayRecord({"body": Array("uint8", (len(data),), stype, data)})
    array = record["body"]
    array.dtype, array.shape = _DTYPES[draw(len(_DTYPES))], shape  # its constructor would refuse some of them
    _put_payload(records, record)


def _change_arrays(draw: Draw, records: RecordDict) -> None:
    names = (("other",), ("body", "more"), ("body\0",), ())[draw(4)]
    data = _data(records)
    _put_payload(records, ArrayRecord({name: Array("uint8", (len(data),), STYPE, data) for name in names}))


def _change_body(draw: Draw, records: RecordDict) -> None:
    data = bytearray(_data(records))
    end = draw(len(data) + 1)
    how = draw(5)
    if how == 0:
        data = data[:end]
    elif how == 1:
        data += bytes(draw(400))
    elif how == 2 and data:
        data[end % len(data)] = draw(256)
    elif how == 3 and len(data) >= 4:
        place = 4 * (end % (len(data) // 4))
        data[place : place + 4] = _FLOAT_BITS[draw(len(_FLOAT_BITS))].to_bytes(4, "little")
    else:
        data *= 1 + draw(3)
    _put_payload(records, ArrayRecord({"body": Array("uint8", (len(data),), STYPE, bytes(data))}))


def _put_payload(records: RecordDict, record: ArrayRecord) -> None:
    """Sets the record; one of another kind in its place is taken out first, lest Flower warns of it."""
    records.pop("payload", None)
    records["payload"] = record


def _data(records: RecordDict) -> bytes:
    record = records.get("payload")
    return bytes(record["body"].data) if isinstance(record, ArrayRecord) and "body" in record else b"\0" * 220


_CHANGES: tuple[Callable[[Draw, RecordDict], None], ...] = (
    _set_value,
    _set_value,
    _add_key,
    _add_key,
    _drop_key,
    _flood,
    _change_record,
    _change_array,
    _change_arrays,
    _change_body,
    _change_body,
    _change_body,
)
