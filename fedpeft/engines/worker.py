"""One worker process of the in-process engine: it answers for the clients that it is handed, and keeps nothing."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import recv_handle
from pathlib import Path

from fedpeft.client import Site
from fedpeft.config import RunConfig
from fedpeft.engines.cohorts import cohorts_of
from fedpeft.engines.local import LocalTransport, sites_of
from fedpeft.errors import FederationError, FedPeftError, sentence
from fedpeft.experiment import adapted_model
from fedpeft.logs import logging_to
from fedpeft.memory import FolderMemory, MemoryStore
from fedpeft.runs import RunFolder
from fedpeft.shared_base import Place, SharedBase, adopt, device_for
from fedpeft.training import use_threads
from fedpeft.updates import Memory
from fedpeft.wire import Failure, Packet

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Saved:
    """A memory that is to be kept once the answer that goes with it is taken."""

    run: str
    partition: int
    round: int
    memory: Memory


@dataclass(frozen=True)
class Noted:
    """Memories are read from `inner`, and what is to be saved is noted."""

    inner: MemoryStore
    saved: list[Saved] = field(default_factory=list)

    def load(self, run: str, partition: int, round_: int) -> Memory:
        """See MemoryStore."""
        return self.inner.load(run, partition, round_)

    def save(self, run: str, partition: int, round_: int, memory: Memory) -> None:
        """See MemoryStore; nothing is written."""
        self.saved.append(Saved(run, partition, round_, memory))


@dataclass(frozen=True)
class Part:
    """Clients of one round that a worker answers for, in order; `ticket` tells its answer from others."""

    ticket: int
    requests: Mapping[int, Packet]
    seconds: float


@dataclass(frozen=True)
class Answered:
    """What the clients of a part said, and what they are to remember; or the error that ends the run."""

    ticket: int
    replies: tuple[tuple[int, Packet | Failure], ...] = ()
    saved: tuple[Saved, ...] = ()
    error: FedPeftError | None = None


@dataclass(frozen=True)
class Started:
    """The worker is ready; `shared_bytes` of its base are those of everybody."""

    shared_bytes: int


@dataclass(frozen=True)
class Duty:
    """What a worker is told as it starts: the run, its number, its threads, and where the base's tensors are.

    `environment` is the parent's, which the process that the worker is a fork of may have seen otherwise.
    """

    config: RunConfig
    number: int
    threads: int
    places: tuple[Place, ...]
    size_bytes: int
    environment: Mapping[str, str]


def work(pipe: Connection, duty: Duty) -> None:
    """Answers part after part until the pipe or the process that started this one ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    follow_parent()
    like_parent(duty.environment)
    use_threads(duty.threads)
    model = replace(duty.config.model, device=device_for(duty.config.model.device, duty.number))
    config = replace(duty.config, model=model)
    with logging_to(sys.stderr, config.observation.log_format, beside_display=True):
        shared = SharedBase(recv_handle(pipe), duty.places, duty.size_bytes)
        moved = adopt(adapted_model(config), shared)
        os.close(shared.descriptor)
        pipe.send(Started(moved))
        sites = sites_of(config)
        with contextlib.suppress(Exception):  # of which it is told once this client is asked
            sites(duty.number % config.federation.clients)  # while others start, the data is read
        while True:
            try:
                part = pipe.recv()
                pipe.send(_answered(part, config, sites))
            except (EOFError, OSError):  # nobody wants to know any more
                return


def _answered(part: Part, config: RunConfig, sites: Callable[[int], Site]) -> Answered:
    folder = RunFolder(Path(config.out))
    noted = Noted(FolderMemory(folder.memories))
    clients = LocalTransport(config.federation.clients, sites, noted, cohorts_of(config.compute, folder.cohort))
    try:
        replies = tuple(clients.exchange(part.requests, part.seconds))
    except FedPeftError as error:
        return Answered(part.ticket, error=error)
    except Exception as error:  # the run ends with it, as it would in one process, but in the parent's words
        _logger.exception("worker failed")
        found, remedy = type(error).__name__, "see what the log says above"
        text = sentence("worker", expected="answers of its clients", found=found, remedy=remedy)
        return Answered(part.ticket, error=FederationError(text))
    return Answered(part.ticket, replies, tuple(noted.saved))


def like_parent(environment: Mapping[str, str]) -> None:
    """From now on this process has the environment of the one that asked for it."""
    os.environ.clear()
    os.environ.update(environment)


def follow_parent() -> None:
    """From now on this process ends as soon as the one that started it has, however that ended."""
    threading.Thread(target=_end_with_parent, name="parent", daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
