import contextlib
import json
import tracemalloc
from collections.abc import Iterator

import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from flwr.supercore.inflatable.inflatable_object import (
    InflatableObject,
    add_header_to_object_body,
    get_all_nested_objects,
)
from flwr.supercore.inflatable.inflatable_utils import inflatable_class_registry, inflate_object_from_contents
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedpeft.engines.flower_guard import guard
from fedpeft.engines.flower_messages import to_packet, to_records
from fedpeft.errors import PacketError
from fedpeft.wire import Packet

PACKET = Packet("update", {"run": "run-1", "round": 1}, bytes(range(256)) * 400)
MOST_BYTES = 200_000


@pytest.fixture(autouse=True)
def guarded() -> Iterator[None]:
    before = dict(inflatable_class_registry)
    guard(MOST_BYTES)
    yield
    inflatable_class_registry.update(before)


def sent(packet: Packet = PACKET) -> tuple[str, dict[str, bytes], dict[str, InflatableObject]]:
    """The id of a message's records, what travels of them by id, and the objects themselves."""
    records = to_records(packet)
    objects = get_all_nested_objects(records)
    return records.object_id, {key: value.deflate() for key, value in objects.items()}, objects


def read(key: str, contents: dict[str, bytes]) -> Packet:
    found = inflate_object_from_contents(key, contents)
    assert isinstance(found, RecordDict)
    return to_packet(found)


def id_of(kind: type, objects: dict[str, InflatableObject]) -> str:
    return next(key for key, value in objects.items() if isinstance(value, kind))


def test_an_honest_message_is_read_as_ever() -> None:
    key, contents, _ = sent()
    assert read(key, contents) == PACKET


def test_a_message_of_zeros_whose_chunks_are_alike_is_read() -> None:
    packet = Packet("update", {}, bytes(MOST_BYTES))
    key, contents, _ = sent(packet)
    assert read(key, contents) == packet


def test_a_chunk_named_a_million_times_is_refused_before_it_is_joined() -> None:
    key, contents, objects = sent()
    where = id_of(Array, objects)
    array = objects[where]
    bomb = {"dtype": "uint8", "shape": [10**11], "stype": "fedpeft.raw/v1", "arraychunk_ids": [0] * 10**6}
    contents[where] = add_header_to_object_body(json.dumps(bomb).encode(), array)
    tracemalloc.start()
    try:
        with pytest.raises(PacketError, match="payload layout"):
            read(key, contents)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 40 * 10**6


@pytest.mark.parametrize("kind", [Array, ArrayRecord, ConfigRecord, RecordDict])
@pytest.mark.parametrize(
    "body", [b"", b"{}", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"arraychunk_ids": [9]}', b'{"a": {}}']
)
def test_a_malformed_object_is_refused_in_a_sentence(kind: type, body: bytes) -> None:
    key, contents, objects = sent()
    where = id_of(kind, objects)
    contents[where] = add_header_to_object_body(body, objects[where])
    with pytest.raises(PacketError, match=": expected "):
        read(key, contents)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_bytes_changed_on_their_way_are_read_or_refused(data: st.DataObject) -> None:
    key, contents, _ = sent(Packet("update", {"run": "run-1"}, b"12345678"))
    where = data.draw(st.sampled_from(sorted(contents)))
    head, mark, body = contents[where].partition(b"\0")
    changed = bytearray(body)
    for _ in range(data.draw(st.integers(1, 4))):
        if changed:
            changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
    contents[where] = head + mark + bytes(changed)
    with contextlib.suppress(PacketError):
        assert isinstance(read(key, contents), Packet)
