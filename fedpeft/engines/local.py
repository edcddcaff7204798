"""The in-process engine: clients are called one after another, or train together; their bytes are really encoded."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

from fedpeft.adapters import AdapterState
from fedpeft.client import FitJob, Fitted, InPlace, Site, handle
from fedpeft.config import RunConfig
from fedpeft.engines.cohorts import Asked, Cohorts, Done, Noting, some_at_once
from fedpeft.experiment import site_of
from fedpeft.memory import MemoryStore
from fedpeft.secure_client import SECURE, with_secrets, without_secrets
from fedpeft.updates import Memory
from fedpeft.wire import PHASE, PHASES, Failure, Packet, require_addressed

NO_TRANSFERS: Mapping[str, float] = {}
"""What an engine knows of the seconds to receive and send where it measures none."""


_FROM_BEFORE = frozenset({"fit", "describe"})
"""The kinds of request that are answered from the memory as it was before their round."""

_KEPT = frozenset({"fit", "secure"})
"""The kinds after which a client remembers something."""


_MOST_SITES = 256
"""Of so many clients what they have of their own is kept from round to round."""


def sites_of(config: RunConfig) -> Callable[[int], Site]:
    """The client of each partition of a simulation, made once as long as there are not too many."""
    return functools.lru_cache(_MOST_SITES)(functools.partial(site_of, config))


@dataclass(frozen=True)
class LocalTransport:
    """A federation inside this process; `site_of(partition)` is the client of a partition.

    With `cohorts`, the clients of a round train together where that serves.
    """

    clients: int
    site_of: Callable[[int], Site]
    memories: MemoryStore
    cohorts: Cohorts | None = None

    def partitions(self) -> tuple[int, ...]:
        """Every partition: in one process nobody is away."""
        return tuple(range(self.clients))

    def exchange(
        self, requests: Mapping[int, Packet], timeout_seconds: float
    ) -> Iterator[tuple[int, Packet | Failure]]:
        """See Transport; a client that would begin after the deadline is a failure."""
        deadline = time.monotonic() + timeout_seconds
        cohorts, late = self.cohorts, Failure("no answer within the deadline")
        if cohorts is not None and all(packet.kind == "fit" for packet in requests.values()):
            for some in some_at_once(list(requests)):
                if time.monotonic() > deadline:
                    yield from ((partition, late) for partition in some)
                else:
                    yield from self._together(cohorts, {partition: requests[partition] for partition in some}, deadline)
            return
        for partition, packet in requests.items():
            if time.monotonic() > deadline:
                yield partition, late
            else:
                yield partition, answer(packet, self.site_of(partition), self.memories)

    def _together(
        self, cohorts: Cohorts, requests: Mapping[int, Packet], deadline: float
    ) -> Iterator[tuple[int, Packet | Failure]]:
        """The answers of clients of which some train together, and the others, one by one, before the deadline."""
        sites = {partition: self.site_of(partition) for partition in requests}
        trained = cohorts.train(
            [one for partition, site in sites.items() for one in _asked(requests[partition], site, self.memories)]
        )
        for partition, site in sites.items():
            if partition in trained:
                done = trained[partition]
                own = replace(site, learner=Done(site.learner, done))
                yield partition, answer(requests[partition], own, self.memories, before=done.seconds)
            elif time.monotonic() > deadline:
                yield partition, Failure("no answer within the deadline")
            else:
                yield partition, answer(requests[partition], site, self.memories)

    def late(self) -> Iterator[tuple[int, Packet | Failure]]:
        """See Transport; here nothing is under way once an exchange is over."""
        return iter(())


@dataclass(frozen=True)
class _Clocked(InPlace):
    """A learner whose seconds of training are noted in `spent`."""

    spent: list[float]

    def fit(self, adapter: AdapterState, job: FitJob) -> Fitted:
        """See Learner."""
        started = time.perf_counter()
        try:
            return self.inner.fit(adapter, job)
        finally:
            self.spent.append(time.perf_counter() - started)


def _asked(packet: Packet, site: Site, memories: MemoryStore) -> list[Asked]:
    """What a request asks of a learner; nothing where it is refused before that, which answering it will say."""
    noted: list[tuple[AdapterState, FitJob]] = []
    require_addressed(packet)
    handle(packet, _memory(packet, site, memories), replace(site, learner=Noting(site.learner, noted)))
    return [Asked(site.partition, site.learner, adapter, job) for adapter, job in noted]


def _memory(packet: Packet, site: Site, memories: MemoryStore) -> Memory:
    """What the client remembers as it answers."""
    run, round_ = str(packet.manifest["run"]), int(packet.manifest["round"])
    memory = memories.load(run, site.partition, round_ if packet.kind in _FROM_BEFORE else round_ + 1)
    if site.strategy.channel:
        memory = with_secrets(memory, memories.load(f"{run}-{SECURE}", site.partition, 1))
    return memory


def answer(
    packet: Packet,
    site: Site,
    memories: MemoryStore,
    transfers: Mapping[str, float] = NO_TRANSFERS,
    *,
    before: float = 0.0,
) -> Packet:
    """The client's reply, with its memory read before and kept after, and its seconds noted.

    The reply to a fit request has the seconds of each of `wire.PHASES`; `transfers` are those that the engine has
    measured. All are always there, so that a reply's size does not depend on what is known. `before` are seconds that
    it has trained already, with others.

    Raises:
        PacketError: the packet does not say of which run and round it is.
        CheckpointError: the memory cannot be read or written.
    """
    started = time.perf_counter()
    require_addressed(packet)
    run, round_ = str(packet.manifest["run"]), int(packet.manifest["round"])
    trains = packet.kind == "fit"
    memory = _memory(packet, site, memories)
    spent: list[float] = []
    reply, kept = handle(packet, memory, replace(site, learner=_Clocked(site.learner, spent)))
    if packet.kind in _KEPT and kept is not memory:
        kept, secrets = without_secrets(kept)
        if site.strategy.channel:
            memories.save(f"{run}-{SECURE}", site.partition, 0, secrets)
        if trains:
            memories.save(run, site.partition, round_, kept)
    known = {**transfers, **({"train": before + sum(spent)} if spent else {})}
    phases = {f"metric.{PHASE}{phase}": float(known.get(phase, -1.0)) for phase in PHASES} if trains else {}
    seconds = before + time.perf_counter() - started
    return replace(reply, manifest={**reply.manifest, **phases, "metric.seconds": seconds})
