"""The door of a Flower federation: who is there, who has what the server has, and who holds which partition."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from fedpeft.errors import ConfigError, FedPeftError, PacketError, sentence
from fedpeft.skew import Installation, refusal, remark, said_in
from fedpeft.wire import Failure, Packet, shown

INTRODUCE = "introduce"
"""The kind of packet that asks a node who it is; it carries the server's `version`."""

INTRODUCTION = "introduction"
"""The kind of packet that answers it: the node's `partition`, and the fields of its `skew.Installation`."""

TURNED_AWAY = "turned_away"
"""The kind of packet that tells a node why it does not take part; nobody waits for its answer."""

_QUESTION_SECONDS = 600.0
"""How long a node may take to say who it is: it loads the base to say which adapter it makes of it."""

_STILL_SECONDS = 120.0
"""A node that has not answered for so long is asked again: it may have been started anew since."""

_ASK_AGAIN_SECONDS = 30.0
"""So long after an answer that is none a node is asked again."""

_RECONSIDER_SECONDS = 120.0
"""So long after it was turned away a node is asked again: it may have what it needs by now."""

_logger = logging.getLogger(__name__)

Post = Callable[[Mapping[int, Packet], float], Mapping[str, int]]
"""Sends packets to nodes, each good for some seconds; gives the node of each message by the message's id."""

Collect = Callable[[list[str]], Iterable[tuple[str, Packet | Failure]]]
"""What has come in answer to messages, by their ids; does not wait."""


@dataclass(frozen=True)
class _Question:
    """A node that was asked who it is, when, and whether its answer is still awaited."""

    node: int
    asked_at: float
    open: bool = True


@dataclass(frozen=True)
class _Refusal:
    """Why a node was turned away, when, and the partition that it claims (-1: none that there is)."""

    reason: str
    at: float
    partition: int


class Door:
    """Asks every new node once who it is, and lets in whoever fits; a node is known by Flower's random number.

    `server` is what the server has, of a base that the run calls `model`. Of two nodes with one partition the first is
    let in, and the second as soon as the first has gone.
    """

    def __init__(self, clients: int, server: Installation, model: str, post: Post, collect: Collect) -> None:
        self._clients, self._server, self._model = clients, server, model
        self._post, self._collect = post, collect
        self._questions: dict[str, _Question] = {}
        self._claims: dict[int, int] = {}
        self._refusals: dict[int, _Refusal] = {}

    def admitted(self, connected: set[int]) -> dict[int, int]:
        """The node of each partition, of those that are connected; those who are new are asked. Does not wait."""
        self._claims = {node: partition for node, partition in self._claims.items() if node in connected}
        self._refusals = {node: refusal for node, refusal in self._refusals.items() if node in connected}
        self._questions = {key: question for key, question in self._questions.items() if question.node in connected}
        self._hear()
        self._ask(connected)
        nodes: dict[int, int] = {}
        for node, partition in self._claims.items():
            nodes.setdefault(partition, node)
        return nodes

    @property
    def known(self) -> int:
        """How many nodes have said who they are."""
        return len(self._claims.keys() | self._refusals.keys())

    @property
    def refused(self) -> dict[int, str]:
        """Why each partition is missing whose only nodes were turned away."""
        held = set(self._claims.values())
        found = {refusal.partition: refusal.reason for refusal in self._refusals.values()}
        return {partition: why for partition, why in sorted(found.items()) if partition >= 0 and partition not in held}

    @property
    def reasons(self) -> list[str]:
        """Why nodes were turned away, each reason once."""
        return list(dict.fromkeys(refusal.reason for refusal in self._refusals.values()))

    def _ask(self, connected: set[int]) -> None:
        """Every node that is connected and has not said who it is, or may have changed, has been asked."""
        now = time.monotonic()
        pauses = {True: _STILL_SECONDS, False: _ASK_AGAIN_SECONDS}
        asked = {each.node for each in self._questions.values() if now - each.asked_at < pauses[each.open]}
        turned = {node for node, each in self._refusals.items() if now - each.at < _RECONSIDER_SECONDS}
        strangers = sorted(connected - self._claims.keys() - asked - turned)
        if strangers:
            packet = Packet(INTRODUCE, {"version": self._server.fedpeft})
            sent = self._post(dict.fromkeys(strangers, packet), _QUESTION_SECONDS)
            self._questions.update({message_id: _Question(node, now) for message_id, node in sent.items()})

    def _hear(self) -> None:
        """Every answer that has come in is taken note of."""
        expired = time.monotonic() - _QUESTION_SECONDS
        self._questions = {key: value for key, value in self._questions.items() if value.asked_at > expired}
        waiting = [message_id for message_id, question in self._questions.items() if question.open]
        for message_id, reply in self._collect(waiting):
            question = self._questions.pop(message_id, None)
            if question is None or question.node in self._claims:
                continue
            try:
                self._judge(question.node, _require_introduction(reply))
            except FedPeftError as error:
                _logger.warning("node %d: %s", question.node, error)
                self._questions[message_id] = _Question(question.node, question.asked_at, open=False)

    def _judge(self, node: int, answer: Packet) -> None:
        """The node is let in, or turned away with a sentence that it is told too."""
        partition, found = answer.manifest.get("partition"), said_in(answer.manifest)
        exists = type(partition) is int and 0 <= partition < self._clients
        number = partition if isinstance(partition, int) and exists else -1
        why = refusal(self._server, found, self._model) or ("" if exists else self._no_partition(partition))
        if why:
            self._turn_away(node, number, why)
            return
        self._refusals.pop(node, None)
        if told := remark(self._server, found):
            _logger.warning("node %d takes part, though not alike: %s", node, ConfigError(told))
        if number in self._claims.values():
            why = _taken(number)
            _logger.warning("node %d waits: %s", node, ConfigError(why))
            self._tell(node, why)
        self._claims[node] = number

    def _turn_away(self, node: int, partition: int, why: str) -> None:
        before = self._refusals.get(node)
        if before is None or before.reason != why:
            _logger.warning("node %d is left out: %s", node, ConfigError(why))
        self._refusals[node] = _Refusal(why, time.monotonic(), partition)
        self._tell(node, why)

    def _tell(self, node: int, why: str) -> None:
        manifest = {"version": self._server.fedpeft, "reason": why}
        self._post({node: Packet(TURNED_AWAY, manifest)}, _QUESTION_SECONDS)

    def _no_partition(self, found: object) -> str:
        return sentence(
            "partition-id",
            expected=f"0 to {self._clients - 1}",
            found=shown(found) if isinstance(found, int) else type(found).__name__,
            remedy="set another as partition in the node's file, or raise federation.clients",
        )


def _taken(partition: int) -> str:
    return sentence(
        f"partition {partition}",
        expected="one node that has it",
        found="another that is connected and has it already",
        remedy="set a number of its own as partition in this node's file, unless it is to stand in for the other",
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
