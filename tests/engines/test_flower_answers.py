"""Answers over Flower's SuperLink, in memory: they come part by part, and nobody waits for another."""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from flwr.app import Message
from flwr.clientapp import ClientApp
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.inflatable.inflatable_utils import ObjectPushError
from flwr.supercore.task_identity import TaskIdentity

from fedpeft.config import RunConfig, override
from fedpeft.engines.flower_answers import AtOnce, PartByPart, answers_over
from fedpeft.engines.flower_grid import GridTransport
from fedpeft.engines.flower_guard import MOST_OBJECTS
from fedpeft.engines.flower_messages import to_records
from fedpeft.engines.flower_node import Uplink, answer_next
from fedpeft.quarantine import ABSENT, REFUSED
from fedpeft.skew import Installation
from fedpeft.wire import Failure, Packet
from tests.engines.link import Link, link_of

CONFIG = override(RunConfig(), ["federation.clients=2", "federation.cohort=2"])
BODY = bytes(range(256)) * 400
MOST_BYTES = 200_000
FIT = Packet("fit", {"round": 1})

Act = Callable[[], None]


@dataclass
class Play:
    """A server's transport, two nodes that it knows, and what happens each time that the server looks for answers."""

    link: Link
    nodes: list[Uplink]
    transport: GridTransport
    acts: list[Act] = field(default_factory=list)

    def when_asked(self, number: int, do: Callable[[Uplink, Message], Act | None]) -> None:
        """Once the node `number` has a message, `do` happens, and what it gives back at the next look."""

        def act() -> None:
            received = self.nodes[number].receive()
            if received is not None:
                self.acts.remove(act)
                later = do(self.nodes[number], received[0])
                self.acts.extend([later] if later else [])

        self.acts.append(act)

    def exchange(self, *asked: int, seconds: float = 10.0) -> dict[int, Packet | Failure]:
        return dict(self.transport.exchange(dict.fromkeys(asked, FIT), seconds))


@pytest.fixture
def play(in_a_flower_run: int) -> Play:
    link = link_of(in_a_flower_run)
    nodes = [link.connect() for _ in range(2)]

    def look() -> None:
        for act in list(found.acts):
            act()
        TaskIdentity.node_id = SUPERLINK_NODE_ID

    transport = GridTransport(link.grid, CONFIG, look, answers=answers_over(link.grid, MOST_BYTES))
    found = Play(link, nodes, transport)
    transport.partitions()
    for partition, node in enumerate(nodes):
        answer_next(node, says(Packet("introduction", {**Installation().fields, "partition": partition})), {})
    assert transport.partitions() == (0, 1)
    TaskIdentity.node_id = SUPERLINK_NODE_ID
    return found


def says(packet: Packet) -> ClientApp:
    """A client that answers whatever it is asked with `packet`."""
    app = ClientApp()
    for register in (app.query, app.train):
        register()(lambda message, _: Message(to_records(packet), reply_to=message))
    return app


def update(number: int, body: bytes = BODY) -> Packet:
    return Packet("update", {"number": number}, body)


def offer(
    node: Uplink, asked: Message, packet: Packet, more: int = 0
) -> tuple[Message, list[tuple[str, bytes]], Callable[[str, bytes], None]]:
    """The server has the head of an answer, and of `more` parts that there are not; its parts, and how to send one."""
    reply = Message(to_records(packet), reply_to=asked)
    reply.metadata.__dict__["_message_id"] = reply.object_id
    tree = get_object_tree(reply)
    tree.children.extend(ObjectTree(object_id=f"{number:064x}") for number in range(more))
    wanted, session = node.send(reply, tree, 0.0)
    parts = [(name, part.deflate()) for name, part in get_all_nested_objects(reply).items() if name in wanted]
    run = reply.metadata.run_id
    return reply, parts, lambda name, content: node.push(run, session, name, content)


def send(node: Uplink, asked: Message, packet: Packet, most_parts: int = 99, more: int = 0) -> Act:
    """The node answers with `packet`, but for the parts above `most_parts`; what sends those."""
    _, parts, push = offer(node, asked, packet, more)
    for part in parts[:most_parts]:
        push(*part)
    return lambda: [push(*part) for part in parts[most_parts:]].clear()


def test_the_way_to_the_answers_fits_the_grid(play: Play) -> None:
    assert isinstance(answers_over(play.link.grid, MOST_BYTES), PartByPart)
    assert isinstance(answers_over(object(), MOST_BYTES), AtOnce)  # type: ignore[arg-type]


def test_an_answer_that_is_still_coming_holds_up_nobody_and_not_the_deadline(play: Play) -> None:
    play.when_asked(0, lambda node, asked: send(node, asked, update(0), most_parts=2) and None)
    play.when_asked(1, lambda node, asked: send(node, asked, update(1)) and None)
    begun = time.monotonic()
    found = play.transport.exchange({0: FIT, 1: FIT}, 3.0)
    assert next(found) == (1, update(1))
    assert time.monotonic() - begun < 2.0
    assert list(found) == [(0, Failure("no answer within the deadline"))]
    assert time.monotonic() - begun < 9.0


def test_an_answer_whose_rest_comes_later_is_whole(play: Play) -> None:
    play.when_asked(0, lambda node, asked: once(play, send(node, asked, update(0), most_parts=3)))
    assert play.exchange(0) == {0: update(0)}


def once(play: Play, act: Act) -> Act:
    """`act`, which happens at the next look alone."""

    def first() -> None:
        play.acts.remove(first)
        act()

    return first


@pytest.mark.parametrize(
    ("size", "more", "words"),
    [(40 * 10**6, 0, "bytes, found more"), (10, MOST_OBJECTS, f"at most {MOST_OBJECTS} parts")],
)
def test_an_answer_larger_than_any_can_be_is_refused_and_not_fetched(
    play: Play, size: int, more: int, words: str
) -> None:
    body = bytes(range(251)) * (size // 251)
    play.when_asked(0, lambda node, asked: send(node, asked, update(0, body), more=more) and None)

    def honest(node: Uplink, asked: Message) -> None:
        send(node, asked, update(1))
        tracemalloc.start()

    play.when_asked(1, honest)
    try:
        found = play.exchange(0, 1)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    refusal = found[0]
    assert found[1] == update(1)
    assert isinstance(refusal, Failure)
    assert refusal.kind == REFUSED
    assert words in refusal.reason
    assert peak < 15 * 10**6


def test_an_answer_whose_parts_are_gone_is_a_failure_of_one_who_is_away(play: Play) -> None:
    play.when_asked(
        0, lambda node, asked: send(node, asked, update(0), most_parts=1) and play.link.state.object_store.clear
    )
    assert play.exchange(0) == {0: Failure("its answer was not sent to its end", ABSENT)}


@pytest.mark.parametrize("there", [True, False])
def test_a_part_that_the_server_refuses_does_not_lose_the_answer(play: Play, there: bool) -> None:
    """It refuses one that it has `there` already, sent again because word of it was lost, or one that came too late."""
    tries: list[str] = []

    def push(run: int, session: str, name: str, content: bytes) -> None:
        tries.append(name)
        if there or len(tries) > 3:
            play.nodes[0].push(run, session, name, content)
        if len(tries) < 4:
            raise ObjectPushError(name, run, session)

    node = play.nodes[0]._replace(push=push)
    play.acts.append(lambda: answer_next(node, says(update(0)), {}) and None)
    assert play.exchange(0) == {0: update(0)}
    assert len(play.link.pushed) == len(set(play.link.pushed))


def test_an_answer_that_is_sent_twice_is_heard_once(play: Play) -> None:
    def twice(node: Uplink, asked: Message) -> None:
        for _ in range(2):
            _, parts, push = offer(node, asked, update(0))
            for part in parts:
                push(*part)

    play.when_asked(0, twice)
    assert list(play.transport.exchange({0: FIT}, 10.0)) == [(0, update(0))]
    assert list(play.transport.late()) == []
