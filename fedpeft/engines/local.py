"""The in-process engine: clients are called one after another, with their bytes really encoded."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

from fedpeft.client import Site, handle
from fedpeft.memory import MemoryStore
from fedpeft.wire import Failure, Packet, require_addressed


@dataclass(frozen=True)
class LocalTransport:
    """A federation inside this process; `site_of(partition)` is the client of a partition."""

    clients: int
    site_of: Callable[[int], Site]
    memories: MemoryStore

    def partitions(self) -> tuple[int, ...]:
        """Every partition: in one process nobody is away."""
        return tuple(range(self.clients))

    def exchange(
        self, requests: Mapping[int, Packet], timeout_seconds: float
    ) -> Iterator[tuple[int, Packet | Failure]]:
        """See Transport; a client that would begin after the deadline is a failure."""
        deadline = time.monotonic() + timeout_seconds
        for partition, packet in requests.items():
            if time.monotonic() > deadline:
                yield partition, Failure("no answer within the deadline")
            else:
                yield partition, answer(packet, self.site_of(partition), self.memories)

    def late(self) -> Iterator[tuple[int, Packet | Failure]]:
        """See Transport; here nothing is under way once an exchange is over."""
        return iter(())


def answer(packet: Packet, site: Site, memories: MemoryStore) -> Packet:
    """The client's reply, with its memory read before and kept after, and its seconds noted.

    Raises:
        PacketError: the packet does not say of which run and round it is.
        CheckpointError: the memory cannot be read or written.
    """
    started = time.perf_counter()
    require_addressed(packet)
    run, round_ = str(packet.manifest["run"]), int(packet.manifest["round"])
    trains = packet.kind == "fit"
    memory = memories.load(run, site.partition, round_ + 1 if packet.kind == "evaluate" else round_)
    reply, kept = handle(packet, memory, site)
    if trains and kept is not memory:
        memories.save(run, site.partition, round_, kept)
    return replace(reply, manifest={**reply.manifest, "metric.seconds": time.perf_counter() - started})
