"""What the server has sent and heard in one round, as the journal tells it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from fedpeft.wire import Failure, Packet, Transport

Record = dict[str, Any]


@dataclass
class Seen:
    """What the replies of one round tell the journal, gathered as they come.

    `ranks` are those of the partitions that were asked, `awaited` those of whom an answer may still come, `sent`
    the bytes that went to each, `said` those of each that are no usable update (descriptions, and what was refused),
    `exchanges` how many requests went out one after another, `waited` the seconds spent waiting, and `phases` those
    that each node tells of.
    """

    cohort: list[int] = field(default_factory=list)
    clients: list[Record] = field(default_factory=list)
    failures: list[Record] = field(default_factory=list)
    surplus: list[int] = field(default_factory=list)
    ranks: dict[int, int] = field(default_factory=dict)
    awaited: dict[int, int] = field(default_factory=dict)
    sent: dict[int, int] = field(default_factory=dict)
    said: dict[int, int] = field(default_factory=dict)
    exchanges: int = 0
    waited: float = 0.0
    phases: dict[int, dict[str, float]] = field(default_factory=dict)

    def sends(self, requests: Mapping[int, Packet]) -> None:
        """Notes an exchange and the bytes of its requests."""
        self.exchanges += bool(requests)
        for partition, request in requests.items():
            self.sent[partition] = self.sent.get(partition, 0) + request.size_bytes

    def hears(self, partition: int, reply: Packet | Failure) -> None:
        """Notes the bytes of a reply that is no usable update; a failure of the line has none."""
        size = reply.size_bytes if isinstance(reply, Packet) else 0
        self.said[partition] = self.said.get(partition, 0) + size


@dataclass
class Counted:
    """A transport that counts the bytes of what goes through it."""

    inner: Transport
    down: int = 0
    up: int = 0

    def partitions(self) -> tuple[int, ...]:
        """See Transport."""
        return self.inner.partitions()

    def exchange(
        self, requests: Mapping[int, Packet], timeout_seconds: float
    ) -> Iterator[tuple[int, Packet | Failure]]:
        """See Transport."""
        self.down += sum(request.size_bytes for request in requests.values())
        for partition, reply in self.inner.exchange(requests, timeout_seconds):
            self.up += reply.size_bytes if isinstance(reply, Packet) else 0
            yield partition, reply

    def late(self) -> Iterator[tuple[int, Packet | Failure]]:
        """See Transport."""
        return self.inner.late()
