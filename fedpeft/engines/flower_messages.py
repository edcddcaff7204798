"""Packets as Flower's records, and back: exact inverses.

The payload is one flat array, because Flower moves each array in requests of its own. Scalars are one
`ConfigRecord`, and a request carries the run's settings in another, so that a node needs none of its own.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

from flwr.app import Array, ArrayRecord, ConfigRecord, ConfigRecordValues, RecordDict

from fedpeft.config import RunConfig, from_flat
from fedpeft.errors import PacketError, sentence
from fedpeft.wire import Packet, Scalar

STYPE = "fedpeft.raw/v1"
"""Flower's name for how the payload's bytes are laid out: as they are."""

_PACKET, _PAYLOAD, _SETTINGS = "packet", "payload", "settings"
_KIND, _BODY = "kind", "body"
_PREFIX = "manifest."


def to_records(packet: Packet, settings: Mapping[str, Scalar] | None = None) -> RecordDict:
    """`packet`, and the flat settings of the run where they are given, as Flower carries them."""
    scalars: dict[str, ConfigRecordValues] = {_KIND: packet.kind}
    scalars |= {f"{_PREFIX}{key}": value for key, value in packet.manifest.items()}
    array = Array("uint8", (len(packet.body),), STYPE, packet.body)
    records = RecordDict({_PACKET: ConfigRecord(scalars), _PAYLOAD: ArrayRecord({_BODY: array})})
    if settings is not None:
        records[_SETTINGS] = ConfigRecord(dict(settings))
    return records


def to_packet(records: RecordDict) -> Packet:
    """The packet that `records` carry.

    Raises:
        PacketError: a record is missing, unknown or of another kind, a value is not a scalar, or the payload
            is not one flat array of as many bytes as it says.
    """
    unknown = records.keys() - {_PACKET, _PAYLOAD, _SETTINGS}
    _require(not unknown, "records", f"{_PACKET}, {_PAYLOAD} and {_SETTINGS}", f"{len(unknown)} more")
    scalars = _scalars(records, _PACKET)
    kind = scalars.pop(_KIND, None)
    _require(isinstance(kind, str), f"{_PACKET}, {_KIND}", "a text", type(kind).__name__)
    odd = [key for key in scalars if not key.startswith(_PREFIX)]
    _require(not odd, f"{_PACKET} record", f"keys that begin with {_PREFIX}", repr(odd[:1])[:80])
    manifest = {key.removeprefix(_PREFIX): value for key, value in scalars.items()}
    return Packet(str(kind), manifest, _body(records))


def to_settings(records: RecordDict) -> RunConfig:
    """The run's settings that a request carries.

    Raises:
        PacketError: it carries none.
        ConfigError: they are not valid.
    """
    return _settings(tuple(sorted(_scalars(records, _SETTINGS).items())))


@functools.lru_cache(maxsize=4)
def _settings(flat: tuple[tuple[str, Scalar], ...]) -> RunConfig:
    return from_flat(dict(flat))


def _scalars(records: RecordDict, name: str) -> dict[str, Scalar]:
    record = records.get(name)
    if not isinstance(record, ConfigRecord):
        raise _refusal(f"{name} record", "a ConfigRecord", "none" if record is None else type(record).__name__)
    scalars: dict[str, Scalar] = {}
    for key, value in record.items():
        if not isinstance(value, bool | int | float | str):
            raise _refusal(f"{name} record, {key[:80]}", "a scalar", type(value).__name__)
        scalars[key] = value
    return scalars


def _body(records: RecordDict) -> bytes:
    record = records.get(_PAYLOAD)
    if not isinstance(record, ArrayRecord):
        raise _refusal(f"{_PAYLOAD} record", "an ArrayRecord", "none" if record is None else type(record).__name__)
    _require(list(record) == [_BODY], f"{_PAYLOAD} record", f"one array named {_BODY}", f"{len(record)} arrays")
    array = record[_BODY]
    _require(array.stype == STYPE, f"{_PAYLOAD} layout", STYPE, repr(array.stype)[:80])
    said = (array.dtype, tuple(array.shape))
    _require(said == ("uint8", (len(array.data),)), f"{_PAYLOAD} shape", f"{len(array.data)} bytes", repr(said)[:80])
    return bytes(array.data)


def _require(holds: bool, place: str, expected: str, found: str) -> None:
    if not holds:
        raise _refusal(place, expected, found)


def _refusal(place: str, expected: str, found: str) -> PacketError:
    return PacketError(
        sentence(f"message, {place}", expected=expected, found=found, remedy="run the same version on both sides")
    )
