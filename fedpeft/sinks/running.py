"""Sinks at work: each in its own thread, behind a queue, switched off by its first failure."""

from __future__ import annotations

import contextlib
import json
import logging
import queue
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from fedpeft.config.observation import ObservationConfig
from fedpeft.errors import sentence
from fedpeft.files import write_atomically
from fedpeft.logs import emit, told
from fedpeft.sinks.kinds import KINDS, remedy_of
from fedpeft.sinks.sink import About, Kind, Record, Sink

MOST_WAITING = 1000
"""A sink that is this many rounds behind is switched off."""

END_SECONDS = 30.0
"""For so long a run that is over waits for its sinks, all of them together."""

_logger = logging.getLogger(__name__)


class Sinks:
    """The sinks of one run: `begin` once, `round` after each round, `end` once; none of them waits or raises."""

    def __init__(
        self, settings: ObservationConfig, root: Path, name: str, run: str, kinds: Mapping[str, Kind] = KINDS
    ) -> None:
        self.settings, self._root, self._name, self._run = settings, root, name, run
        self._kinds = kinds
        self._workers: list[_Worker] = []
        self._how = ""

    def begin(self, records: Sequence[Record], done: int) -> None:
        """Every sink is being opened; it gets the rounds up to `done` that it lacks out of `records`, the journal.

        One whose library is not installed is told now, and left out.
        """
        for name in self.settings.sinks:
            kind = self._kinds[name]
            if install := remedy_of(kind):
                remedy = f"run {install}; this run goes on without it"
                text = sentence(
                    f"observation.sinks {name}", expected=kind.library, found="no such library", remedy=remedy
                )
                emit(_logger, "sink_off", text, level=logging.WARNING, run=self._run, sink=name, error="not installed")
                continue
            worker = _Worker(name, kind, self.settings, self._about(name, records, done))
            worker.start([record for record in records if record["event"] == "round" and record["round"] <= done])
            self._workers.append(worker)

    def round(self, record: Record) -> None:
        """The sinks are told of a round that is settled."""
        for worker in self._workers:
            worker.put(("round", dict(record)))

    def end(self, how: str) -> None:
        """The run is over: `completed`, `early`, `budget` or `failed`. The first call counts."""
        if self._how:
            return
        self._how = how
        for worker in self._workers:
            worker.put(("end", {"how": how}))

    def wait(self, seconds: float = END_SECONDS) -> None:
        """The sinks have written what they were told, or `seconds` are over."""
        deadline = time.monotonic() + seconds
        for worker in self._workers:
            worker.wait(max(0.0, deadline - time.monotonic()))

    def _about(self, name: str, records: Sequence[Record], done: int) -> About:
        held = _held(_cursor(self._root, name), repr(self.settings.settings_of(name)))
        return About(self._root, self._name, self._run, records[0], done, held)


@contextlib.contextmanager
def opened(
    settings: ObservationConfig, root: Path, name: str, run: str, kinds: Mapping[str, Kind] = KINDS
) -> Iterator[Sinks]:
    """The sinks of a run; whatever ends the context without `end` is a failure of the run."""
    sinks = Sinks(settings, root, name, run, kinds)
    try:
        yield sinks
    finally:
        sinks.end("failed")
        sinks.wait()


class _Worker:
    """One sink, its thread and the queue between them."""

    def __init__(self, name: str, kind: Kind, settings: ObservationConfig, about: About) -> None:
        self._name, self._kind, self._about = name, kind, about
        self._settings = settings.settings_of(name)
        self._queue: queue.Queue[tuple[str, Record]] = queue.Queue(MOST_WAITING)
        self._off = threading.Event()
        self._thread = threading.Thread(target=self._work, name=f"sink-{name}", daemon=True)
        self._before: list[Record] = []

    def start(self, before: list[Record]) -> None:
        self._before = before
        self._thread.start()

    def put(self, item: tuple[str, Record]) -> None:
        if self._off.is_set():
            return
        try:
            self._queue.put_nowait(item)
        except queue.Full:
            self._switch_off(TimeoutError(), f"it is {MOST_WAITING} rounds behind")

    def wait(self, seconds: float) -> None:
        self._thread.join(seconds)
        if self._thread.is_alive():
            self._switch_off(TimeoutError(), f"it did not end within {END_SECONDS:g} seconds")

    def _work(self) -> None:
        try:
            sink = self._kind.open(self._settings, self._about)
            for record in self._before:
                if record["round"] > sink.held:
                    self._settle(sink, record)
            while not self._off.is_set():
                what, record = self._queue.get()
                if what == "end":
                    return sink.end(str(record["how"]))
                if record["round"] > sink.held:
                    self._settle(sink, record)
        except BaseException as error:
            self._switch_off(error, _reason(error))

    def _settle(self, sink: Sink, record: Record) -> None:
        sink.round(record)
        cursor = {"round": record["round"], "settings": repr(self._settings)}
        write_atomically(_cursor(self._about.root, self._name), json.dumps(cursor).encode())

    def _switch_off(self, error: BaseException, why: str) -> None:
        if self._off.is_set():
            return
        self._off.set()
        text = "the sink %s is switched off and the run goes on without it: %s"
        fields = {"run": self._about.run, "sink": self._name, "error": type(error).__name__}
        emit(_logger, "sink_off", text, self._name, why, level=logging.WARNING, **fields)


def _reason(error: BaseException) -> str:
    """What a log says of a library's error: the system's own words, or the error's class."""
    return str(error.strerror).lower() if isinstance(error, OSError) and error.strerror else told(error)


def _cursor(root: Path, name: str) -> Path:
    """The file that says up to which round a sink has everything."""
    return root / "sinks" / f"{name}.json"


def _held(cursor: Path, settings: str) -> int:
    """The round that the cursor names; 0 where there is none that can be read, or the sink had another place then."""
    try:
        known = json.loads(cursor.read_bytes())
        return int(known["round"]) if known["settings"] == settings else 0
    except (OSError, ValueError, KeyError, TypeError):
        return 0
