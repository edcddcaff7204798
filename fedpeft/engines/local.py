"""The in-process engine: clients are called one after another, with their bytes really encoded."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

from fedpeft.adapters import AdapterSpec, AdapterState
from fedpeft.client import FitJob, Fitted, Learner, Site, handle
from fedpeft.memory import MemoryStore
from fedpeft.secure_client import SECURE, with_secrets, without_secrets
from fedpeft.wire import PHASE, PHASES, Failure, Packet, require_addressed

NO_TRANSFERS: Mapping[str, float] = {}
"""What an engine knows of the seconds to receive and send where it measures none."""


_FROM_BEFORE = frozenset({"fit", "describe"})
"""The kinds of request that are answered from the memory as it was before their round."""

_KEPT = frozenset({"fit", "secure"})
"""The kinds after which a client remembers something."""


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


@dataclass(frozen=True)
class _Clocked:
    """A learner whose seconds of training are noted in `spent`."""

    inner: Learner
    spent: list[float]

    @property
    def spec(self) -> AdapterSpec:
        """See Learner."""
        return self.inner.spec

    def fit(self, adapter: AdapterState, job: FitJob) -> Fitted:
        """See Learner."""
        started = time.perf_counter()
        try:
            return self.inner.fit(adapter, job)
        finally:
            self.spent.append(time.perf_counter() - started)

    def evaluate(self, adapter: AdapterState) -> Mapping[str, float]:
        """See Learner."""
        return self.inner.evaluate(adapter)


def answer(packet: Packet, site: Site, memories: MemoryStore, transfers: Mapping[str, float] = NO_TRANSFERS) -> Packet:
    """The client's reply, with its memory read before and kept after, and its seconds noted.

    The reply to a fit request has the seconds of each of `wire.PHASES`; `transfers` are those that the engine has
    measured. All are always there, so that a reply's size does not depend on what is known.

    Raises:
        PacketError: the packet does not say of which run and round it is.
        CheckpointError: the memory cannot be read or written.
    """
    started = time.perf_counter()
    require_addressed(packet)
    run, round_ = str(packet.manifest["run"]), int(packet.manifest["round"])
    trains = packet.kind == "fit"
    memory = memories.load(run, site.partition, round_ if packet.kind in _FROM_BEFORE else round_ + 1)
    if site.strategy.channel:
        memory = with_secrets(memory, memories.load(f"{run}-{SECURE}", site.partition, 1))
    spent: list[float] = []
    reply, kept = handle(packet, memory, replace(site, learner=_Clocked(site.learner, spent)))
    if packet.kind in _KEPT and kept is not memory:
        kept, secrets = without_secrets(kept)
        if site.strategy.channel:
            memories.save(f"{run}-{SECURE}", site.partition, 0, secrets)
        if trains:
            memories.save(run, site.partition, round_, kept)
    known = {**transfers, **({"train": sum(spent)} if spent else {})}
    phases = {f"metric.{PHASE}{phase}": float(known.get(phase, -1.0)) for phase in PHASES} if trains else {}
    return replace(reply, manifest={**reply.manifest, **phases, "metric.seconds": time.perf_counter() - started})
