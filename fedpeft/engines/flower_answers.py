"""How the server takes in what nodes have sent in answer.

Flower fetches an answer as soon as its head is there, and waits for the rest: where a node was cut off meanwhile, or
has declared what it does not have, everybody else waits too, three minutes and more, whatever the round's deadline.
And it fetches whatever was declared. Over a SuperLink an answer is therefore taken in part by part here, as its parts
come: nobody waits for another, and one that is larger than any answer can be is refused before it is fetched.

It leans on the client that Flower's `HttpGrid` keeps, which is no public interface; versions are pinned, and tests
hold it.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from flwr.app import Message
from flwr.common.constant import ErrorCode
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, ObjectTree
from flwr.proto.runtime_pb2 import PullAppMessagesRequest
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from flwr.supercore.inflatable.inflatable_protobuf_utils import make_pull_object_fn_protobuf
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectPullError,
    ObjectUnavailableError,
    inflate_object_from_contents,
)
from flwr.superlink.grid import HttpGrid

from fedpeft.engines.flower_guard import MOST_OBJECTS
from fedpeft.engines.flower_messages import to_packet
from fedpeft.errors import PacketError, sentence
from fedpeft.quarantine import ABSENT, FAILED, REFUSED
from fedpeft.wire import Failure, Packet

HEAD_BYTES = 2**20
"""What an answer may have besides its payload: its records, and what Flower says of them."""

_CRASHES = (ErrorCode.CLIENT_APP_RAISED_EXCEPTION, ErrorCode.LOAD_CLIENT_APP_EXCEPTION)

_MALFORMED = (ValueError, TypeError, LookupError, AttributeError, AssertionError, RecursionError)
"""What Flower raises for a message that is not what it should be."""

_logger = logging.getLogger(__name__)


class Answers(Protocol):
    """A way to the answers that have come."""

    def pull(self, message_ids: list[str]) -> Iterator[tuple[str, Packet | Failure]]:
        """What has come in answer to these messages, by their ids; each answer comes once. Does not wait."""
        ...


@dataclass(frozen=True)
class AtOnce:
    """Answers as Flower's grid reads them; of what it cannot read, that it cannot.

    Flower raises for all that it was asked for together, so after an error it is asked for them one by one.
    """

    grid: Grid

    def pull(self, message_ids: list[str]) -> Iterator[tuple[str, Packet | Failure]]:
        """See Answers."""
        try:
            found = list(self.grid.pull_messages(message_ids)) if message_ids else []
        except _MALFORMED as error:
            if len(message_ids) > 1:
                for message_id in message_ids:
                    yield from self.pull([message_id])
            else:
                yield message_ids[0], _unreadable(error)
            return
        for reply in found:
            yield reply.metadata.reply_to_message_id, _read(reply)


@dataclass
class _Coming:
    """An answer whose head is there: its id, the parts that are still to come, till when, and those that have come."""

    answer: str
    wanted: list[str]
    until: float
    parts: dict[str, bytes] = field(default_factory=dict)
    size_bytes: int = 0


class PartByPart:
    """Answers over a SuperLink, of at most `most_bytes` of payload each; see the module."""

    def __init__(self, grid: HttpGrid, most_bytes: int) -> None:
        self._grid = grid
        self._most_bytes = most_bytes + HEAD_BYTES
        self._coming: dict[str, _Coming] = {}

    def pull(self, message_ids: list[str]) -> Iterator[tuple[str, Packet | Failure]]:
        """See Answers."""
        now = time.monotonic()
        self._coming = {asked: one for asked, one in self._coming.items() if one.until > now}
        new = [message_id for message_id in message_ids if message_id not in self._coming]
        self._coming |= self._heads(new)
        for asked in [message_id for message_id in message_ids if message_id in self._coming]:
            answer = self._taken_in(self._coming[asked])
            if answer is not None:
                del self._coming[asked]
                yield asked, answer

    def _heads(self, message_ids: list[str]) -> Mapping[str, _Coming]:
        """The answers to these messages that have begun to come; the SuperLink tells of each once."""
        if not message_ids:
            return {}
        found = self._client.PullMessages(PullAppMessagesRequest(message_ids=message_ids))
        now = time.monotonic()
        return {
            head.metadata.reply_to_message_id: _Coming(
                head.metadata.message_id, _parts_of(tree), now + max(1.0, head.metadata.ttl)
            )
            for head, tree in zip(found.messages_list, found.message_object_trees, strict=True)
        }

    def _taken_in(self, one: _Coming) -> Packet | Failure | None:
        """The answer, or why there is none; None where some of it is still to come."""
        pull = make_pull_object_fn_protobuf(self._client.PullObject, self._grid.node, self._grid.run.run_id)
        try:
            _require(len(one.wanted) <= MOST_OBJECTS, f"at most {MOST_OBJECTS} parts", "more")
            while one.wanted:
                content = pull(one.wanted[0])
                one.size_bytes += len(content)
                _require(one.size_bytes <= self._most_bytes, f"at most {self._most_bytes} bytes", "more")
                one.parts[one.wanted.pop(0)] = content
        except ObjectUnavailableError:
            return None
        except ObjectPullError:
            return Failure("its answer was not sent to its end", ABSENT)
        except PacketError as error:
            self._confirm(one)
            return Failure(str(error), REFUSED)
        self._confirm(one)
        try:
            found = inflate_object_from_contents(one.answer, one.parts)
            return _read(found) if isinstance(found, Message) else _unreadable(TypeError())
        except _MALFORMED as error:
            return _unreadable(error)

    def _confirm(self, one: _Coming) -> None:
        """The SuperLink need keep the answer no longer."""
        run = self._grid.run.run_id
        self._client.ConfirmMessageReceived(
            ConfirmMessageReceivedRequest(node=self._grid.node, run_id=run, message_object_id=one.answer)
        )

    @property
    def _client(self) -> Any:
        return self._grid._runtime_client


def answers_over(grid: Grid, most_bytes: int) -> Answers:
    """The way to the answers that fits `grid`; over a SuperLink, answers of at most `most_bytes` of payload each."""
    return PartByPart(grid, most_bytes) if isinstance(grid, HttpGrid) else AtOnce(grid)


def _parts_of(tree: ObjectTree) -> list[str]:
    """The ids of an answer's parts, each once; of one that has too many, as many as show it."""
    names = (part.object_id for part in iterate_object_tree(tree))
    return list(dict.fromkeys(itertools.islice(names, MOST_OBJECTS + 1)))


def _require(holds: bool, expected: str, found: str) -> None:
    if not holds:
        remedy = "use the same adapter settings on both sides"
        raise PacketError(sentence("its answer", expected=expected, found=found, remedy=remedy))


def _unreadable(error: Exception) -> Failure:
    _logger.warning("an answer cannot be read: %s", type(error).__name__)
    return Failure("its answer cannot be read", REFUSED)


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
