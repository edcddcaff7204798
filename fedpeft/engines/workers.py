"""The in-process engine over several worker processes, which have the frozen base between them.

Each worker (of `fedpeft.engines.nursery`) loads the model as the parent did and then takes the parent's tensors for its
own. Only the parent writes what clients remember, as it hands an answer on; so a
worker may die at any moment and its clients be asked again, and who trained in vain remembers nothing.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import send_handle
from pathlib import Path

from fedpeft.bases import device_of
from fedpeft.config import RunConfig
from fedpeft.config.run import ComputeConfig
from fedpeft.engines import nursery
from fedpeft.engines.cohorts import MOST_CLIENTS, cohorts_of
from fedpeft.engines.local import LocalTransport, sites_of
from fedpeft.engines.worker import Answered, Duty, Part, Started, work
from fedpeft.errors import ConfigError, FederationError, sentence
from fedpeft.experiment import adapted_model
from fedpeft.memory import FolderMemory, MemoryStore
from fedpeft.runs import RunFolder
from fedpeft.shared_base import SharedBase, share
from fedpeft.wire import Failure, Packet, Transport

MOST_TRIES = 2
"""So often a client is tried whose worker dies, before it counts as failed."""

_LEAST_PATIENCE_SECONDS = 60.0
"""At least so long after the deadline a worker may go on with clients that it has begun."""

_END_SECONDS = 10.0

_LATE = Failure("no answer within the deadline")

_logger = logging.getLogger(__name__)


@dataclass
class _Worker:
    """A worker process, this end of its pipe, and the part that it is at."""

    number: int
    process: BaseProcess
    pipe: Connection
    ready: bool = False
    part: Part | None = None


@dataclass
class WorkersTransport:
    """A federation in worker processes, which are started by the first exchange; `close` ends them."""

    config: RunConfig
    record: Path
    memories: MemoryStore
    _workers: list[_Worker] = field(default_factory=list)
    _base: list[SharedBase] = field(default_factory=list)
    _tickets: Iterator[int] = field(default_factory=itertools.count)

    def partitions(self) -> tuple[int, ...]:
        """Every partition: on one machine nobody is away."""
        return tuple(range(self.config.federation.clients))

    def exchange(
        self, requests: Mapping[int, Packet], timeout_seconds: float
    ) -> Iterator[tuple[int, Packet | Failure]]:
        """See Transport; answers come in the order of the requests, whoever is done first.

        Raises:
            FederationError: no worker can be started.
        """
        if not self._base:
            self._base.append(share(adapted_model(self.config)))
            self._workers += [self._start(number) for number in range(self.config.compute.workers)]
        together = cohorts_of(self.config.compute, self.record) is not None
        fits = all(packet.kind == "fit" for packet in requests.values())
        parts = parts_of(list(requests), self.config.compute.workers) if together and fits else [[p] for p in requests]
        one = _Exchange(self, requests, parts, timeout_seconds, first_alone=together and not self.record.exists())
        for at in range(len(parts)):
            answered = one.awaited(at)
            if answered.error is not None:
                raise answered.error
            for partition, reply in answered.replies:
                for saved in (saved for saved in answered.saved if saved.partition == partition):
                    self.memories.save(saved.run, saved.partition, saved.round, saved.memory)
                yield partition, reply

    def late(self) -> Iterator[tuple[int, Packet | Failure]]:
        """See Transport; what workers are at when an exchange is closed is let go."""
        return iter(())

    def close(self) -> None:
        """No worker is left; they have nothing to lose."""
        for worker in self._workers:
            _end(worker)
        self._workers.clear()
        for base in self._base:
            os.close(base.descriptor)
        self._base.clear()

    def _start(self, number: int) -> _Worker:
        base, context = self._base[0], nursery.context()
        duty = Duty(
            self.config, number, threads_of(self.config.compute), base.places, base.size_bytes, dict(os.environ)
        )
        ours, theirs = context.Pipe()
        process = context.Process(target=work, args=(theirs, duty), name=f"worker {number + 1}", daemon=True)
        process.start()
        theirs.close()
        with contextlib.suppress(OSError):  # of one that has ended already, reading tells
            send_handle(ours, base.descriptor, process.pid)
        return _Worker(number, process, ours)

    def _lost(self, worker: _Worker) -> None:
        """Another worker takes the place of one that has ended, unless it ended before it had begun.

        Raises:
            FederationError: none is left.
        """
        _end(worker)
        self._workers.remove(worker)
        if worker.ready:
            self._workers.append(self._start(worker.number))
        if not self._workers:
            raise FederationError(
                sentence(
                    "compute.workers",
                    expected="worker processes that start",
                    found=f"all {self.config.compute.workers} ended, the last with code {worker.process.exitcode}",
                    remedy="free memory or lower compute.workers, and go on with --resume",
                )
            )


@dataclass
class _Exchange:
    """What is left to do of one exchange, and what has been answered, by the part's place in order."""

    over: WorkersTransport
    requests: Mapping[int, Packet]
    parts: Sequence[Sequence[int]]
    seconds: float
    first_alone: bool
    done: dict[int, Answered] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.deadline = time.monotonic() + self.seconds
        self.latest = self.deadline + max(self.seconds, _LEAST_PATIENCE_SECONDS)
        self.pending = list(range(len(self.parts)))
        self.tries = [0] * len(self.parts)
        self.places: dict[int, int] = {}

    def awaited(self, at: int) -> Answered:
        """What the clients of a part came to."""
        while at not in self.done:
            if time.monotonic() > self.deadline:
                for place in self.pending:
                    self._failed(place, _LATE)
                self.pending.clear()
            self._hand_out()
            if at not in self.done:
                self._hear()
        return self.done.pop(at)

    def _hand_out(self) -> None:
        """Every worker that is ready and idle has a part, as far as there are any."""
        for worker in list(self.over._workers):
            busy_first = self.first_alone and bool(self.places)
            if not worker.ready or worker.part is not None or not self.pending or busy_first:
                continue
            place = self._choice(worker)
            self.pending.remove(place)
            ticket = next(self.over._tickets)
            requests = {partition: self.requests[partition] for partition in self.parts[place]}
            worker.part = Part(ticket, requests, max(0.0, self.deadline - time.monotonic()))
            self.places[ticket] = place
            self.tries[place] += 1
            try:
                worker.pipe.send(worker.part)
            except OSError:
                self._died(worker)

    def _choice(self, worker: _Worker) -> int:
        """The next part of a worker: of clients that it has seen before, whose data it has read, if any is left."""
        if self.first_alone:
            return self.pending[0]
        workers = self.over.config.compute.workers
        own = (place for place in self.pending if self.parts[place][0] % workers == worker.number)
        return next(own, self.pending[-1])

    def _hear(self) -> None:
        """Something that a worker said has been heard, or its end; or the time of one is up."""
        ends = {worker.pipe: worker for worker in self.over._workers}
        seconds = (self.deadline if self.pending else self.latest) - time.monotonic()
        heard = wait(list(ends), max(0.0, seconds))
        for pipe in heard:
            worker = ends[pipe]  # type: ignore[index]
            try:
                self._take(worker, worker.pipe.recv())
            except (EOFError, OSError):
                self._died(worker)
        if not heard and time.monotonic() > self.latest:
            for worker in [worker for worker in self.over._workers if worker.part]:
                self._died(worker)

    def _take(self, worker: _Worker, said: Started | Answered) -> None:
        if isinstance(said, Started):
            worker.ready = True
            return
        worker.part = None
        place = self.places.pop(said.ticket, None)
        if place is not None:  # else it is the answer to an exchange that was closed
            self.done[place] = said
            self.first_alone = False

    def _died(self, worker: _Worker) -> None:
        """The clients of a worker that is gone are to be tried again, or have failed."""
        part, worker.part = worker.part, None
        _end(worker)
        clients = "" if part is None else ", ".join(map(str, part.requests))
        _logger.warning(
            "worker %d ended (code %s) while it was at partitions %s; they are tried %d times at most",
            worker.number + 1,
            worker.process.exitcode,
            clients or "none",
            MOST_TRIES,
        )
        place = None if part is None else self.places.pop(part.ticket, None)
        if place is not None and self.tries[place] < MOST_TRIES and time.monotonic() <= self.deadline:
            self.pending.insert(0, place)
        elif place is not None:
            self._failed(place, Failure(f"its worker process ended (code {worker.process.exitcode})"))
        self.over._lost(worker)

    def _failed(self, place: int, why: Failure) -> None:
        self.first_alone = False
        self.done[place] = Answered(-1, tuple((partition, why) for partition in self.parts[place]))


def parts_of(partitions: Sequence[int], workers: int) -> list[Sequence[int]]:
    """The clients that train together, in order: a part for each worker, of at most `MOST_CLIENTS`, of like size."""
    count = max(workers, -(-len(partitions) // MOST_CLIENTS))
    edges = [len(partitions) * at // count for at in range(count + 1)]
    return [partitions[start:stop] for start, stop in itertools.pairwise(edges) if stop > start]


def threads_of(compute: ComputeConfig) -> int:
    """Torch's threads in each worker: its part of the machine's, one at least."""
    return max(1, (compute.threads or os.cpu_count() or 1) // compute.workers)


def require_cores(config: RunConfig) -> None:
    """Raises ConfigError where workers are to divide all of this machine's cores, and there are too few."""
    compute, cores = config.compute, os.cpu_count() or 1
    if compute.threads == 0 and compute.workers > cores and device_of(config.model) == "cpu":
        raise ConfigError(
            sentence(
                "compute.workers",
                expected=f"at most {cores}, the cores of this machine",
                found=compute.workers,
                remedy="lower it",
            )
        )


@contextlib.contextmanager
def local_transport(config: RunConfig, folder: RunFolder) -> Iterator[Transport]:
    """The clients of a run on this machine, in this process or in workers, which are gone after.

    Raises:
        ConfigError: there are more workers than cores to divide.
    """
    require_cores(config)
    memories = FolderMemory(folder.memories)
    if config.compute.workers == 1:
        cohorts = cohorts_of(config.compute, folder.cohort)
        yield LocalTransport(config.federation.clients, sites_of(config), memories, cohorts)
        return
    over = WorkersTransport(config, folder.cohort, memories)
    try:
        yield over
    finally:
        over.close()


def _end(worker: _Worker) -> None:
    worker.process.kill()
    worker.process.join(_END_SECONDS)
    worker.pipe.close()
