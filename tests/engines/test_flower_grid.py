"""The transport over Flower's own in-memory grid; the test plays the nodes."""

from __future__ import annotations

import logging
import re
import secrets
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any
from uuid import uuid4

import pytest
from flwr.app import Error, Message, RecordDict
from flwr.proto.task_pb2 import Task
from flwr.server.superlink.linkstate import LinkState, LinkStateFactory
from flwr.server.superlink.linkstate.in_memory_linkstate import RunRecord
from flwr.supercore.constant import FLWR_IN_MEMORY_DB_NAME, NOOP_FEDERATION_ID
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.run import Run
from flwr.superlink.federation import NoOpFederationManager
from flwr.superlink.grid import InMemoryGrid

from fedpeft.config import RunConfig, override
from fedpeft.engines import flower_door
from fedpeft.engines.flower_grid import GridTransport
from fedpeft.engines.flower_messages import to_packet, to_records, to_settings
from fedpeft.errors import FederationError
from fedpeft.quarantine import REFUSED
from fedpeft.skew import Installation
from fedpeft.version import VERSION
from fedpeft.wire import Failure, Packet

CONFIG = override(RunConfig(), ["federation.clients=3", "federation.cohort=2", "seed=5"])
Answer = Callable[[Message], RecordDict | Error | None]


@dataclass(frozen=True)
class Federation:
    """A grid, the state behind it, and the nodes that the test has connected."""

    grid: InMemoryGrid
    state: LinkState

    def connect(self) -> int:
        node = self.state.create_node("owner", "owner", secrets.token_bytes(32), heartbeat_interval=1e6)
        self.state.acknowledge_node_heartbeat(node, 1e6)
        return int(node)

    def reply(self, node: int, answer: Answer) -> None:
        """The node answers whatever was sent to it."""
        for message in self.state.get_message_ins(node_id=node, limit=None):
            said = answer(message)
            if said is not None:
                reply = Message(said, reply_to=message)
                reply.metadata.__dict__["_message_id"] = str(uuid4())
                self.state.store_message_res(reply)


@pytest.fixture
def federation(in_a_flower_run: int) -> Federation:
    factory = LinkStateFactory(FLWR_IN_MEMORY_DB_NAME, NoOpFederationManager(), ObjectStoreFactory())
    run = Run.create_empty(run_id=in_a_flower_run)
    run.federation_id, run.primary_task_id = NOOP_FEDERATION_ID, 1
    state = factory.state()
    state.task_store[1] = Task(task_id=1, run_id=in_a_flower_run)
    state.run_ids[in_a_flower_run] = RunRecord(run=run)
    grid = InMemoryGrid(state_factory=factory)
    grid.set_run(run)
    return Federation(grid, state)


def introduces(partition: object, version: str = VERSION, **more: str) -> Answer:
    """The answer of a node that says no more than nodes did before they told what they have."""
    return lambda message: to_records(Packet("introduction", {"version": version, "partition": partition, **more}))


def has(partition: int, own: Installation) -> Answer:
    return lambda message: to_records(Packet("introduction", {**own.fields, "partition": partition}))


def echo(message: Message) -> RecordDict:
    packet = to_packet(message.content)
    return to_records(Packet("update", packet.manifest, packet.body))


def test_nodes_are_known_by_the_partitions_that_they_name(federation: Federation) -> None:
    transport = GridTransport(federation.grid, CONFIG)
    assert transport.partitions() == ()
    nodes = {partition: federation.connect() for partition in (2, 0)}
    assert transport.partitions() == ()
    for partition, node in nodes.items():
        federation.reply(node, introduces(partition))
    assert transport.partitions() == (0, 2)
    late = federation.connect()
    transport.partitions()
    federation.reply(late, introduces(1))
    assert transport.partitions() == (0, 1, 2)
    transport.wait_for(3, 0.0)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (introduces(0, "0.0.1"), f"is left out: fedpeft: expected {VERSION}, found 0.0.1"),
        (introduces(3), "is left out: partition-id: expected 0 to 2, found 3"),
        (introduces(-1), "is left out: partition-id: expected 0 to 2, found -1"),
        (introduces(True), "is left out: partition-id: expected 0 to 2, found True"),
        (introduces("0"), "is left out: partition-id: expected 0 to 2, found str"),
        (lambda message: Error(2, "it\nbroke"), "it broke (Flower's error 2)"),
        (lambda message: to_records(Packet("failure", {"reason": "no partition"})), "found no partition; correct"),
        (lambda message: RecordDict(), "packet record: expected a ConfigRecord, found none"),
    ],
)
def test_a_node_that_cannot_take_part_is_left_out_with_a_sentence(
    federation: Federation, caplog: pytest.LogCaptureFixture, answer: Answer, expected: str
) -> None:
    transport, node = GridTransport(federation.grid, CONFIG), federation.connect()
    transport.partitions()
    federation.reply(node, answer)
    with caplog.at_level(logging.WARNING, "fedpeft"):
        assert transport.partitions() == ()
        assert transport.partitions() == ()
    assert [expected in line for line in caplog.messages] == [True]
    with pytest.raises(FederationError, match=r"3 clients connected within 0 seconds, found 0 of .* partition 0, 1, 2"):
        transport.wait_for(3, 0.0)


SERVER = Installation(libraries={"peft": "0.21.2", "torch": "2.13.0"}, base="b1", adapter="a1")
ANOTHER_PEFT = replace(SERVER, libraries={"peft": "0.20.0", "torch": "2.13.0"})
TOLD = "libraries of the node: expected peft 0.21, found peft 0.20.0; run there: pip install 'peft==0.21.2'."


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        (ANOTHER_PEFT, TOLD),
        (
            replace(SERVER, base="b2"),
            "base model of the node: expected that of asset:minilm, digest b1, found digest b2",
        ),
        (replace(SERVER, adapter="a2"), "adapter on the node's base: expected digest a1, found digest a2"),
        (replace(SERVER, fedpeft="0.0.1"), f"fedpeft: expected {VERSION}, found 0.0.1"),
    ],
)
def test_a_node_that_has_something_else_is_refused_at_the_door_and_told_so(
    federation: Federation, caplog: pytest.LogCaptureFixture, own: Installation, expected: str
) -> None:
    transport, node = GridTransport(federation.grid, CONFIG, server=SERVER), federation.connect()
    transport.partitions()
    federation.reply(node, has(2, own))
    with caplog.at_level(logging.WARNING, "fedpeft"):
        assert [transport.partitions() for _ in range(3)] == [(), (), ()]
    assert [f"node {node} is left out: {expected}" in line for line in caplog.messages] == [True]
    assert [expected in why for why in transport.refused().values()] == [True]
    assert list(transport.refused()) == [2]
    heard: list[Packet] = []
    federation.reply(node, lambda message: heard.append(to_packet(message.content)))
    assert [(packet.kind, packet.manifest["reason"]) for packet in heard] == [("turned_away", transport.refused()[2])]
    with pytest.raises(FederationError, match=re.escape(f"without partition 0, 1, 2; refused: {expected}")):
        transport.wait_for(3, 0.0)
    reply = dict(transport.exchange({2: Packet("fit", {"round": 1})}, 1.0))[2]
    assert reply == Failure(transport.refused()[2], REFUSED)


def test_a_node_with_another_patch_release_takes_part_with_a_warning(
    federation: Federation, caplog: pytest.LogCaptureFixture
) -> None:
    transport, node = GridTransport(federation.grid, CONFIG, server=SERVER), federation.connect()
    transport.partitions()
    federation.reply(node, has(2, replace(SERVER, libraries={"peft": "0.21.0", "torch": "2.13.0+cu128"})))
    with caplog.at_level(logging.WARNING, "fedpeft"):
        assert transport.partitions() == (2,)
    assert [f"node {node} takes part, though not alike" in line for line in caplog.messages] == [True]
    assert "run there: pip install 'peft==0.21.2'." in caplog.text
    assert transport.refused() == {}


def test_a_node_that_was_refused_is_asked_again_after_a_while(
    federation: Federation, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    transport, node = GridTransport(federation.grid, CONFIG, server=SERVER), federation.connect()
    transport.partitions()
    federation.reply(node, has(2, ANOTHER_PEFT))
    transport.partitions()
    asked: list[str] = []

    def answers(own: Installation) -> Answer:
        def answer(message: Message) -> RecordDict | Error | None:
            asked.append(to_packet(message.content).kind)
            return has(2, own)(message)

        return answer

    federation.reply(node, answers(SERVER))
    assert transport.partitions() == ()
    assert asked == ["turned_away"]
    monkeypatch.setattr(flower_door, "_RECONSIDER_SECONDS", 0.0)
    caplog.clear()
    with caplog.at_level(logging.WARNING, "fedpeft"):
        transport.partitions()
        federation.reply(node, answers(ANOTHER_PEFT))
        assert transport.partitions() == ()
    assert not caplog.messages
    transport.partitions()
    federation.reply(node, answers(SERVER))
    assert transport.partitions() == (2,)
    assert transport.refused() == {}
    with pytest.raises(FederationError, match="found 1 of 1 nodes usable, without partition 0, 1; start as many"):
        transport.wait_for(3, 0.0)


def test_a_node_that_comes_back_is_asked_anew(federation: Federation, monkeypatch: pytest.MonkeyPatch) -> None:
    transport, node = GridTransport(federation.grid, CONFIG), federation.connect()
    transport.partitions()
    federation.reply(node, lambda message: None)
    here = federation.grid.get_node_ids
    monkeypatch.setattr(federation.grid, "get_node_ids", lambda: [])
    assert transport.partitions() == ()
    monkeypatch.setattr(federation.grid, "get_node_ids", here)
    transport.partitions()
    federation.reply(node, introduces(1))
    assert transport.partitions() == (1,)


def test_a_node_that_is_silent_is_asked_again_and_both_answers_count_once(
    federation: Federation, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flower_door, "_STILL_SECONDS", 0.0)
    transport, node = GridTransport(federation.grid, CONFIG), federation.connect()
    transport.partitions()
    transport.partitions()
    federation.reply(node, introduces(1))
    with caplog.at_level(logging.WARNING, "fedpeft"):
        assert [transport.partitions() for _ in range(2)] == [(1,), (1,)]
    assert not caplog.messages


def test_of_two_nodes_with_one_partition_the_first_is_asked(
    federation: Federation, caplog: pytest.LogCaptureFixture
) -> None:
    def play() -> None:
        if training:
            federation.reply(first, echo)
            federation.reply(second, lambda message: Error(2, "the second was asked"))

    training = False
    first, second = federation.connect(), federation.connect()
    transport = GridTransport(federation.grid, CONFIG, play)
    transport.partitions()
    federation.reply(first, introduces(1))
    transport.partitions()
    federation.reply(second, introduces(1))
    with caplog.at_level(logging.WARNING, "fedpeft"):
        assert transport.partitions() == (1,)
    told = "partition 1: expected one node that has it, found another that is connected and has it already; "
    told += "set a number of its own as partition in this node's file, unless it is to stand in for the other."
    assert f"node {second} waits: {told}" in caplog.text
    heard: list[Packet] = []
    federation.reply(second, lambda message: heard.append(to_packet(message.content)))
    assert [packet.manifest["reason"] for packet in heard] == [told]
    training = True
    request = Packet("fit", {"round": 1})
    assert dict(transport.exchange({1: request}, 5.0)) == {1: Packet("update", request.manifest)}


def test_the_second_of_two_nodes_with_one_partition_stands_in_once_the_first_has_gone(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    training: list[bool] = []
    first, second = federation.connect(), federation.connect()
    transport = GridTransport(federation.grid, CONFIG, lambda: federation.reply(second, echo) if training else None)
    transport.partitions()
    federation.reply(first, introduces(1))
    transport.partitions()
    federation.reply(second, introduces(1))
    assert transport.partitions() == (1,)
    training.append(True)
    request = Packet("fit", {"round": 1})
    assert isinstance(dict(transport.exchange({1: request}, 0.2))[1], Failure)
    monkeypatch.setattr(federation.grid, "get_node_ids", lambda: [second])
    assert dict(transport.exchange({1: request}, 5.0)) == {1: Packet("update", request.manifest)}


def test_a_node_that_does_not_answer_in_time_is_a_failure(federation: Federation) -> None:
    transport, node = GridTransport(federation.grid, CONFIG), federation.connect()
    transport.partitions()
    federation.reply(node, introduces(1))
    assert transport.partitions() == (1,)
    replies = dict(transport.exchange({1: Packet("fit", {"round": 1})}, 0.2))
    assert list(replies) == [1]
    assert isinstance(replies[1], Failure)


def test_what_comes_after_an_exchange_is_heard_once(federation: Federation) -> None:
    transport = GridTransport(federation.grid, override(CONFIG, ["federation.late=carry"]))
    node = federation.connect()
    transport.partitions()
    federation.reply(node, introduces(1))
    assert transport.partitions() == (1,)
    request = Packet("fit", {"round": 1}, b"\1")
    assert isinstance(dict(transport.exchange({1: request}, 0.3))[1], Failure)
    assert list(transport.late()) == []
    federation.reply(node, echo)
    assert list(transport.late()) == [(1, Packet("update", request.manifest, request.body))]
    assert list(transport.late()) == []


def test_an_exchange_that_is_closed_early_leaves_the_rest_to_come_late(federation: Federation) -> None:
    nodes = [federation.connect() for _ in range(2)]
    answers: dict[int, Answer] = {}

    def play() -> None:
        for node, answer in answers.items():
            federation.reply(node, answer)

    transport = GridTransport(federation.grid, CONFIG, play)
    for partition, node in enumerate(nodes):
        answers[node] = introduces(partition)
        transport.partitions()
        transport.partitions()
        del answers[node]
    answers[nodes[1]] = echo
    replies = transport.exchange(dict.fromkeys((0, 1), Packet("fit", {"round": 1})), 5.0)
    assert next(replies)[0] == 1
    replies.close()  # type: ignore[attr-defined]
    federation.reply(nodes[0], echo)
    assert [partition for partition, _ in transport.late()] == [0]


def test_an_answer_that_flower_cannot_read_is_the_failure_of_one_node(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes: dict[int, Answer] = {}

    def play() -> None:
        for node, answer in nodes.items():
            federation.reply(node, answer)

    transport = GridTransport(federation.grid, CONFIG, play)
    for partition in range(2):
        nodes = {federation.connect(): introduces(partition)}
        transport.partitions()
        transport.partitions()
    nodes = dict.fromkeys(federation.grid.get_node_ids(), echo)
    pull, broken = federation.grid.pull_messages, []

    def pulled(message_ids: list[str]) -> Any:
        broken.extend(message_ids[:1] if not broken else [])
        if broken[0] in message_ids:
            raise ValueError("a message that is nested too deep")
        return pull(message_ids)

    monkeypatch.setattr(federation.grid, "pull_messages", pulled)
    request = Packet("fit", {"round": 1})
    replies = dict(transport.exchange(dict.fromkeys((0, 1), request), 5.0))
    assert sorted(type(reply).__name__ for reply in replies.values()) == ["Failure", "Packet"]
    assert Failure("its answer cannot be read", REFUSED) in replies.values()


def test_an_exchange_yields_one_item_for_each_request(federation: Federation) -> None:
    nodes: dict[int, int] = {}
    answers: dict[int, Answer] = {0: echo, 1: lambda message: Error(3, "expired")}
    seen: list[RunConfig] = []

    def play() -> None:
        for partition, node in nodes.items():
            federation.reply(node, answers[partition])

    transport = GridTransport(federation.grid, CONFIG, play)
    for partition in answers:
        nodes[partition] = federation.connect()
        answers[partition], later = introduces(partition), answers[partition]
        transport.partitions()
        transport.partitions()
        answers[partition] = later

    def sees(message: Message) -> RecordDict:
        seen.append(to_settings(message.content))
        return echo(message)

    answers[0] = sees
    request = Packet("fit", {"round": 1, "run": "r", "flag": True}, b"\1\2\3")
    replies = dict(transport.exchange(dict.fromkeys((0, 1, 2), request), 5.0))
    assert replies[0] == Packet("update", request.manifest, request.body)
    assert replies[1] == Failure("expired (Flower's error 3)")
    assert replies[2] == Failure("its node is not connected")
    assert seen == [CONFIG]


@pytest.mark.parametrize("kind", ["fit", "evaluate", "describe"])
def test_every_kind_of_request_reaches_its_node(federation: Federation, kind: str) -> None:
    node = federation.connect()
    said = [introduces(1)]
    transport = GridTransport(federation.grid, CONFIG, lambda: federation.reply(node, said[0]))
    transport.partitions()
    assert transport.partitions() == (1,)
    said[0] = echo
    request = Packet(kind, {"round": 1, "run": "r", "residual.to": "1,2"}, b"\1\2")
    assert dict(transport.exchange({1: request}, 5.0)) == {1: Packet("update", request.manifest, request.body)}


def test_an_engine_that_has_ended_ends_the_exchange(federation: Federation) -> None:
    ended: list[str] = []

    def check() -> None:
        if ended:
            raise FederationError(ended[0])

    transport = GridTransport(federation.grid, CONFIG, check)
    transport.partitions()
    ended.append("Ray is gone.")
    with pytest.raises(FederationError, match="Ray is gone"):
        transport.wait_for(3, 600.0)
