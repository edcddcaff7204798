from __future__ import annotations

import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.config import RunConfig, override, to_flat
from fedpeft.engines.flower_messages import STYPE, to_packet, to_records, to_settings
from fedpeft.errors import ConfigError, PacketError
from fedpeft.wire import Packet

texts = st.text(st.characters(codec="utf-8"), max_size=12)
integers = st.integers(-(2**63), 2**63 - 1)
scalars = st.booleans() | integers | st.floats(allow_nan=False) | texts
packets = st.builds(Packet, texts, st.dictionaries(texts, scalars, max_size=6), st.binary(max_size=200))


def typed(packet: Packet) -> list[tuple[str, type, object]]:
    return sorted((key, type(value), value) for key, value in packet.manifest.items())


@given(packets)
def test_a_packet_comes_back_as_it_was(packet: Packet) -> None:
    back = to_packet(to_records(packet))
    assert back == packet
    assert typed(back) == typed(packet)


@given(packets)
def test_a_packet_comes_back_through_flowers_serialisation(packet: Packet) -> None:
    back = to_packet(recorddict_from_proto(recorddict_to_proto(to_records(packet, {"seed": 3}))))
    assert back == packet
    assert typed(back) == typed(packet)
    assert back.size_bytes == packet.size_bytes


def test_a_payload_is_one_array_whatever_it_holds() -> None:
    records = to_records(Packet("fit", {}, b"\0" * 10_000))
    assert [list(record) for record in records.array_records.values()] == [["body"]]


def test_settings_come_back_as_they_were() -> None:
    config = override(
        RunConfig(), ["seed=11", "training.learning_rate=0.003", "task.sequence_classification.labels=a,b"]
    )
    records = recorddict_from_proto(recorddict_to_proto(to_records(Packet("fit"), to_flat(config))))
    assert to_settings(records) == config
    assert to_packet(records) == Packet("fit")


def test_settings_that_are_absent_or_wrong_are_refused() -> None:
    with pytest.raises(PacketError, match="settings record: expected a ConfigRecord, found none"):
        to_settings(to_records(Packet("fit")))
    with pytest.raises(ConfigError, match="sed"):
        to_settings(to_records(Packet("fit"), {"sed": 3}))
    records = to_records(Packet("fit"))
    records["settings"] = ConfigRecord({"seed": [1, 2]})
    with pytest.raises(PacketError, match="seed: expected a scalar, found list"):
        to_settings(records)


def array(data: bytes = b"ab", shape: tuple[int, ...] = (2,), dtype: str = "uint8", stype: str = STYPE) -> Array:
    return Array(dtype, shape, stype, data)


HEAD = ConfigRecord({"kind": "update"})
BODY = ArrayRecord({"body": array()})
HOSTILE = [
    ({}, "packet record: expected a ConfigRecord, found none"),
    ({"packet": HEAD}, "payload record: expected an ArrayRecord, found none"),
    ({"packet": BODY, "payload": BODY}, "packet record: expected a ConfigRecord, found ArrayRecord"),
    ({"packet": HEAD, "payload": HEAD}, "payload record: expected an ArrayRecord, found ConfigRecord"),
    ({"packet": HEAD, "payload": BODY, "more": MetricRecord({"a": 1})}, "found 1 more"),
    ({"packet": ConfigRecord({}), "payload": BODY}, "packet, kind: expected a text, found NoneType"),
    ({"packet": ConfigRecord({"kind": 3}), "payload": BODY}, "packet, kind: expected a text, found int"),
    ({"packet": ConfigRecord({"kind": "fit", "round": 1}), "payload": BODY}, "found .'round'."),
    ({"packet": ConfigRecord({"kind": "fit", "manifest.a": b"x"}), "payload": BODY}, "expected a scalar, found bytes"),
    ({"packet": ConfigRecord({"kind": "fit", "manifest.a": [1]}), "payload": BODY}, "expected a scalar, found list"),
    ({"packet": HEAD, "payload": ArrayRecord({"body": array(), "b": array()})}, "found 2 arrays"),
    ({"packet": HEAD, "payload": ArrayRecord({"other": array()})}, "expected one array named body"),
    ({"packet": HEAD, "payload": ArrayRecord({})}, "found 0 arrays"),
    ({"packet": HEAD, "payload": ArrayRecord({"body": array(shape=(2**40,))})}, "expected 2 bytes"),
    ({"packet": HEAD, "payload": ArrayRecord({"body": array(shape=(2, 1))})}, "expected 2 bytes"),
    ({"packet": HEAD, "payload": ArrayRecord({"body": array(dtype="float32")})}, "expected 2 bytes"),
    ({"packet": HEAD, "payload": ArrayRecord({"body": array(stype="numpy.ndarray")})}, "payload layout"),
]


@pytest.mark.parametrize(("records", "expected"), HOSTILE)
def test_hostile_content_is_refused_in_one_sentence(records: dict[str, ConfigRecord], expected: str) -> None:
    with pytest.raises(PacketError, match=expected) as caught:
        to_packet(RecordDict(records))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400
