"""The server's way to nodes through Flower: the transport over a `Grid`."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping

from flwr.app import Message, MessageType, RecordDict
from flwr.serverapp import Grid

from fedpeft.config import RunConfig, to_flat
from fedpeft.engines.flower_answers import Answers, AtOnce
from fedpeft.engines.flower_door import INTRODUCE, TURNED_AWAY, Door
from fedpeft.engines.flower_messages import to_records
from fedpeft.errors import FederationError, sentence
from fedpeft.quarantine import REFUSED
from fedpeft.skew import Installation
from fedpeft.wire import Failure, Packet

_TYPES = {
    "fit": MessageType.TRAIN,
    "evaluate": MessageType.EVALUATE,
    "secure": MessageType.TRAIN,
    "describe": MessageType.QUERY,
    INTRODUCE: MessageType.QUERY,
    TURNED_AWAY: MessageType.QUERY,
}
_LEAST_PAUSE_SECONDS, _MOST_PAUSE_SECONDS = 0.02, 0.5
_MOST_REASONS = 3
_NOT_CONNECTED = "its node is not connected"

_logger = logging.getLogger(__name__)


def _fine() -> None:
    pass


class GridTransport:
    """Reaches the clients of a run over a Flower grid; implements `fedpeft.wire.Transport`.

    Nodes take part that the `Door` has let in, which holds them against `server`, what the server has (by default its
    libraries). Every request carries the settings of the run. `check` is called at each poll and raises where the
    engine below has ended. What nodes answer comes by `answers`, or as Flower's grid reads it.
    """

    def __init__(
        self,
        grid: Grid,
        config: RunConfig,
        check: Callable[[], None] = _fine,
        server: Installation | None = None,
        answers: Answers | None = None,
    ) -> None:
        self._grid = grid
        self._pull = (answers or AtOnce(grid)).pull
        self._settings = to_flat(config)
        self._check = check
        self._late: dict[str, int] = {}
        self._time_to_live = 2 if config.federation.late == "carry" else 1
        model = "@".join(filter(None, (config.model.source, config.model.revision)))
        self._door = Door(config.federation.clients, server or Installation(), model, self._post, self._pull)

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
        refused = self._door.refused
        for partition in requests.keys() - nodes.keys():
            turned_away = partition in refused
            yield partition, Failure(refused[partition], REFUSED) if turned_away else Failure(_NOT_CONNECTED)
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

    def refused(self) -> Mapping[int, str]:
        """Why partitions are missing whose nodes are connected, but do not have what the server has."""
        return self._door.refused

    def late(self) -> Iterator[tuple[int, Packet | Failure]]:
        """See Transport."""
        for message_id, reply in self._pull(list(self._late)):
            partition = self._late.pop(message_id, None)
            if partition is not None:
                yield partition, reply

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

    def _post(self, packets: Mapping[int, Packet], seconds: float) -> dict[str, int]:
        """The node that each message went to, by the message's id."""
        return self._push({(node, node): packet for node, packet in packets.items()}, seconds)

    def _nodes(self) -> dict[int, int]:
        """The node of each partition that can be reached now."""
        self._check()
        return self._door.admitted(set(self._grid.get_node_ids()))

    def _shortage(self, wanted: set[int], here: set[int], seconds: float) -> str:
        missing = ", ".join(map(str, sorted(wanted - here)[:8]))
        refused = "".join(f"; refused: {reason}" for reason in self._door.reasons[:_MOST_REASONS])
        return sentence(
            "federation",
            expected=f"{len(wanted)} clients connected within {seconds:g} seconds",
            found=f"{len(here)} of {self._door.known} nodes usable, without partition {missing}{refused}",
            remedy="start as many nodes as federation.clients, each with its partition, or lower federation.clients",
        )
