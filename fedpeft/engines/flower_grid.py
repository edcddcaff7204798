"""The server's way to nodes through Flower: the transport over a `Grid`."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from flwr.app import Message, MessageType, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid

from fedpeft.config import RunConfig, to_flat
from fedpeft.engines.flower_messages import to_packet, to_records
from fedpeft.errors import FederationError, FedPeftError, PacketError, sentence
from fedpeft.quarantine import ABSENT, FAILED, REFUSED
from fedpeft.version import VERSION
from fedpeft.wire import Failure, Packet

INTRODUCE = "introduce"
"""The kind of packet that asks a node who it is."""

INTRODUCTION = "introduction"
"""The kind of packet that answers it: `version` and `partition`."""

_TYPES = {
    "fit": MessageType.TRAIN,
    "evaluate": MessageType.EVALUATE,
    "describe": MessageType.QUERY,
    INTRODUCE: MessageType.QUERY,
}
_CRASHES = (ErrorCode.CLIENT_APP_RAISED_EXCEPTION, ErrorCode.LOAD_CLIENT_APP_EXCEPTION)
_QUESTION_SECONDS = 120.0
_ASK_AGAIN_SECONDS = 30.0
_LEAST_PAUSE_SECONDS, _MOST_PAUSE_SECONDS = 0.02, 0.5

_MALFORMED = (ValueError, TypeError, LookupError, AttributeError, AssertionError, RecursionError)
"""What Flower raises for a message that is not what it should be."""

_logger = logging.getLogger(__name__)


def _fine() -> None:
    pass


@dataclass(frozen=True)
class _Question:
    """A node that was asked who it is, when, and whether its answer is still awaited."""

    node: int
    asked_at: float
    open: bool = True


class GridTransport:
    """Reaches the clients of a run over a Flower grid; implements `fedpeft.wire.Transport`.

    Flower names nodes by random numbers. A node that is new is asked once for its partition and its version of
    fedpeft; it takes part from when it has answered. Of two nodes with one partition the first is asked to
    train. Every request carries the settings of the run. `check` is called at each poll and raises where the
    engine below has ended.
    """

    def __init__(self, grid: Grid, config: RunConfig, check: Callable[[], None] = _fine) -> None:
        self._grid = grid
        self._clients = config.federation.clients
        self._settings = to_flat(config)
        self._check = check
        self._late: dict[str, int] = {}
        self._time_to_live = 2 if config.federation.late == "carry" else 1
        self._questions: dict[str, _Question] = {}
        self._claims: dict[int, int | None] = {}

    def partitions(self) -> tuple[int, ...]:
        """The partitions whose nodes are connected and have said who they are; does not wait."""
        return tuple(sorted(self._nodes()))

    def wait_for(self, clients: int, timeout_seconds: float) -> None:
        """Partitions 0 to `clients` - 1 can be reached.

        Raises:
            FederationError: not all of them within the time.
        """
        deadline = time.monotonic() + timeout_seconds
        wanted, found = set(range(clients)), -1
        while True:
            here = wanted & set(self.partitions())
            if len(here) != found:
                found = len(here)
                _logger.info("%d of %d clients are connected", found, clients)
            if here == wanted:
                return
            if time.monotonic() > deadline:
                raise FederationError(self._shortage(wanted, here, timeout_seconds))
            time.sleep(min(_MOST_PAUSE_SECONDS, max(0.0, deadline - time.monotonic())))

    def exchange(
        self, requests: Mapping[int, Packet], timeout_seconds: float
    ) -> Iterator[tuple[int, Packet | Failure]]:
        """See Transport; Flower is told the time-out too, so that a late message is dropped on its way.

        Where late updates count, it is told twice as much.
        """
        deadline = time.monotonic() + timeout_seconds
        nodes = self._nodes()
        for partition in requests.keys() - nodes.keys():
            yield partition, Failure("its node is not connected")
        reachable = {partition: packet for partition, packet in requests.items() if partition in nodes}
        waiting = self._push(
            {(partition, nodes[partition]): packet for partition, packet in reachable.items()},
            self._time_to_live * timeout_seconds,
        )
        for partition in reachable.keys() - set(waiting.values()):
            yield partition, Failure("its message could not be handed to Flower")
        try:
            for message_id, reply in self._replies(waiting, deadline):
                yield waiting.pop(message_id), reply
        finally:
            self._late = dict(waiting)
        for partition in waiting.values():
            yield partition, Failure("no answer within the deadline")

    def late(self) -> Iterator[tuple[int, Packet | Failure]]:
        """See Transport."""
        for message_id, reply in self._pull(list(self._late)):
            partition = self._late.pop(message_id, None)
            if partition is not None:
                yield partition, reply

    def _pull(self, message_ids: list[str]) -> Iterator[tuple[str, Packet | Failure]]:
        """What has come in answer to these messages, by their ids; of what Flower cannot read, that it cannot.

        Flower raises for all that it was asked for together, so after an error it is asked for them one by one.
        """
        try:
            found = list(self._grid.pull_messages(message_ids)) if message_ids else []
        except _MALFORMED as error:
            if len(message_ids) > 1:
                for message_id in message_ids:
                    yield from self._pull([message_id])
            else:
                _logger.warning("an answer cannot be read: %s", type(error).__name__)
                yield message_ids[0], Failure("its answer cannot be read", REFUSED)
            return
        for reply in found:
            yield reply.metadata.reply_to_message_id, _read(reply)

    def _replies(self, waiting: Mapping[str, int], deadline: float) -> Iterator[tuple[str, Packet | Failure]]:
        """Replies to the messages in `waiting`, until it is empty or the deadline has passed."""
        pause = _LEAST_PAUSE_SECONDS
        while waiting and time.monotonic() < deadline:
            self._check()
            replies = dict(self._pull(list(waiting)))
            known = {message_id: reply for message_id, reply in replies.items() if message_id in waiting}
            yield from known.items()
            pause = _LEAST_PAUSE_SECONDS if known else min(_MOST_PAUSE_SECONDS, 1.5 * pause)
            if waiting:
                time.sleep(min(pause, max(0.0, deadline - time.monotonic())))

    def _push(self, requests: Mapping[tuple[int, int], Packet], ttl_seconds: float) -> dict[str, int]:
        """The number (of partition or node) that comes first in each key of `requests`, by its message's id."""
        records: dict[int, RecordDict] = {}
        messages: list[tuple[int, Message]] = []
        for (number, node), packet in requests.items():
            if id(packet) not in records:
                records[id(packet)] = to_records(packet, self._settings)
            group = str(packet.manifest.get("round", ""))
            message = Message(records[id(packet)], node, _TYPES[packet.kind], ttl=ttl_seconds, group_id=group)
            messages.append((number, message))
        taken = set(self._grid.push_messages([message for _, message in messages]))
        by_id = {message.metadata.message_id: number for number, message in messages}
        return {message_id: number for message_id, number in by_id.items() if message_id in taken}

    def _nodes(self) -> dict[int, int]:
        """The node of each partition that can be reached now."""
        self._check()
        connected = set(self._grid.get_node_ids())
        self._claims = {node: partition for node, partition in self._claims.items() if node in connected}
        self._hear()
        self._ask(connected)
        nodes: dict[int, int] = {}
        for node, partition in self._claims.items():
            if partition is not None:
                nodes.setdefault(partition, node)
        return nodes

    def _ask(self, connected: set[int]) -> None:
        """Every node that is connected and has not said who it is has been asked."""
        now = time.monotonic()
        resting = {
            question.node for question in self._questions.values() if now - question.asked_at < _ASK_AGAIN_SECONDS
        }
        awaited = {question.node for question in self._questions.values() if question.open}
        strangers = connected - self._claims.keys() - resting - awaited
        if strangers:
            packet = Packet(INTRODUCE, {"version": VERSION})
            asked = self._push({(node, node): packet for node in sorted(strangers)}, _QUESTION_SECONDS)
            self._questions.update({message_id: _Question(node, now) for message_id, node in asked.items()})

    def _hear(self) -> None:
        """Every answer that has come in is taken note of."""
        expired = time.monotonic() - 2 * _QUESTION_SECONDS
        self._questions = {key: value for key, value in self._questions.items() if value.asked_at > expired}
        waiting = [message_id for message_id, question in self._questions.items() if question.open]
        for message_id, reply in self._pull(waiting):
            question = self._questions.get(message_id)
            if question is None:
                continue
            try:
                self._claims[question.node] = self._claim(_require_introduction(reply), question.node)
                del self._questions[message_id]
            except FedPeftError as error:
                _logger.warning("node %d: %s", question.node, error)
                self._questions[message_id] = _Question(question.node, question.asked_at, open=False)

    def _claim(self, answer: Packet, node: int) -> int | None:
        """The partition that `answer` claims, or None, with a line in the log, where the node is left out."""
        version, partition = answer.manifest.get("version"), answer.manifest.get("partition")
        reason = ""
        if version != VERSION:
            reason = sentence("fedpeft", expected=VERSION, found=version, remedy="install the same version on the node")
        elif isinstance(partition, bool) or not isinstance(partition, int) or not 0 <= partition < self._clients:
            reason = sentence(
                "partition-id",
                expected=f"0 to {self._clients - 1}",
                found=repr(partition),
                remedy="start the node with another, or raise federation.clients",
            )
        if reason:
            _logger.warning("node %d is left out: %s", node, reason)
            return None
        if partition in self._claims.values():
            _logger.warning("node %d waits: another node has partition %s already", node, partition)
        return partition if isinstance(partition, int) else None

    def _shortage(self, wanted: set[int], here: set[int], seconds: float) -> str:
        missing = ", ".join(map(str, sorted(wanted - here)[:8]))
        return sentence(
            "federation",
            expected=f"{len(wanted)} clients connected within {seconds:g} seconds",
            found=f"{len(here)} of {len(self._claims)} nodes usable, without partition {missing}",
            remedy="start as many nodes as federation.clients, each with its partition, or lower federation.clients",
        )


def _require_introduction(answer: Packet | Failure) -> Packet:
    if isinstance(answer, Failure):
        raise PacketError(f"{answer.reason}")
    if answer.kind != INTRODUCTION:
        found = str(answer.manifest.get("reason", answer.kind))[:500]
        raise PacketError(
            sentence(
                "its first answer", expected="who it is", found=found, remedy="correct the node; it is asked again"
            )
        )
    return answer


def _read(reply: Message) -> Packet | Failure:
    """What a reply holds; an error of Flower's is a failure."""
    if reply.has_error():
        reason = " ".join(str(reply.error.reason or "no reason given").split())
        kind = FAILED if reply.error.code in _CRASHES else ABSENT
        return Failure(f"{reason[:500]} (Flower's error {reply.error.code})", kind)
    try:
        return to_packet(reply.content)
    except PacketError as error:
        return Failure(str(error), REFUSED)
