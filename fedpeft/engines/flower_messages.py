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
from fedpeft.wire import Packet, Scalar, shown

STYPE = "fedpeft.raw/v1"
"""Flower's name for how the payload's bytes are laid out: as they are."""

_PACKET, _PAYLOAD, _SETTINGS = "packet", "payload", "settings"
_KIND, _BODY = "kind", "body"
_PREFIX = "manifest."

MOST_FIELDS: Mapping[str, int] = {_PACKET: 256, _SETTINGS: 8192}
"""The most scalars of each record."""

MOST_KEY_CHARACTERS, MOST_TEXT_CHARACTERS = 256, 65_536
"""The longest key and the longest text of a record; a request's ranks are a text of up to eight characters a module."""

_LEAST_INTEGER, _MOST_INTEGER = -(2**63), 2**64 - 1


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
        PacketError: a record is missing, unknown or of another kind, it has too many values or one that is not a
            scalar, is too long, or is more than 64 bits hold, or the payload is not one flat array of as many bytes as
            it says.
    """
    unknown = records.keys() - {_PACKET, _PAYLOAD, _SETTINGS}
    _require(not unknown, "records", f"{_PACKET}, {_PAYLOAD} and {_SETTINGS}", f"{len(unknown)} more")
    scalars = _scalars(records, _PACKET)
    kind = scalars.pop(_KIND, None)
    kind = _text(kind, MOST_KEY_CHARACTERS, f"{_PACKET}, {_KIND}")
    odd = [key for key in scalars if not key.startswith(_PREFIX)]
    _require(not odd, f"{_PACKET} record", f"keys that begin with {_PREFIX}", repr(odd[:1])[:80])
    manifest = {key.removeprefix(_PREFIX): value for key, value in scalars.items()}
    return Packet(kind, manifest, _body(records))


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
    _require(
        len(record) <= MOST_FIELDS[name], f"{name} record", f"at most {MOST_FIELDS[name]} values", str(len(record))
    )
    return {_text(key, MOST_KEY_CHARACTERS, f"{name} record, a key"): _scalar(name, key, record[key]) for key in record}


def _scalar(name: str, key: str, value: ConfigRecordValues) -> Scalar:
    place = f"{name} record, {shown(key)[1:-1]}"
    if isinstance(value, str):
        return _text(value, MOST_TEXT_CHARACTERS, place)
    if not isinstance(value, bool | int | float):
        raise _refusal(place, "a scalar", type(value).__name__)
    _require(
        isinstance(value, float) or _LEAST_INTEGER <= value <= _MOST_INTEGER, place, "64 bits at most", shown(value)
    )
    return value


def _text(value: object, most: int, place: str) -> str:
    """`value`, which is a text of at most `most` characters that UTF-8 can write."""
    if not isinstance(value, str):
        raise _refusal(place, "a text", type(value).__name__)
    _require(len(value) <= most, place, f"at most {most} characters", str(len(value)))
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise _refusal(place, "a text in Unicode", "half a surrogate pair") from error
    return value


def _body(records: RecordDict) -> bytes:
    record = records.get(_PAYLOAD)
    if not isinstance(record, ArrayRecord):
        raise _refusal(f"{_PAYLOAD} record", "an ArrayRecord", "none" if record is None else type(record).__name__)
    _require(list(record) == [_BODY], f"{_PAYLOAD} record", f"one array named {_BODY}", f"{len(record)} arrays")
    array = record[_BODY]
    _require(array.stype == STYPE, f"{_PAYLOAD} layout", STYPE, shown(array.stype))
    size = len(array.data)
    fits = len(array.shape) == 1 and type(array.shape[0]) is int and array.shape[0] == size
    said = f"{shown(array.dtype)} of {len(array.shape)} axes, {shown(array.shape[0]) if array.shape else 'no'} bytes"
    _require(fits and array.dtype == "uint8", f"{_PAYLOAD} shape", f"{size} bytes", said)
    return bytes(array.data)


def _require(holds: bool, place: str, expected: str, found: str) -> None:
    if not holds:
        raise _refusal(place, expected, found)


def _refusal(place: str, expected: str, found: str) -> PacketError:
    return PacketError(
        sentence(f"message, {place}", expected=expected, found=found, remedy="run the same version on both sides")
    )
