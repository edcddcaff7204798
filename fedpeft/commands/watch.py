"""`fedpeft watch`."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live

from fedpeft.commands.watch_view import picture, plain_lines, round_line
from fedpeft.errors import RunFolderError, sentence
from fedpeft.watching import Follower, Status, status_of

WAIT_SECONDS = 60.0
"""For so long a folder may be missing: a run makes it when it begins."""

_LEAST_PAUSE_SECONDS, _MOST_PAUSE_SECONDS = 0.2, 2.0
_OVER = frozenset({"ended", "failed"})

Show = Callable[[Status, float], None]


def run_watch(run: Path, *, once: bool, as_json: bool, wait_seconds: float = WAIT_SECONDS) -> int:
    """The run is shown, once or until it is over; the exit code: 1 where the run has failed, else 0.

    Raises:
        RunFolderError: there is no such folder, or its journal is corrupt.
    """
    console = Console()
    follower = Follower(run / "journal.jsonl")
    if once:
        _require_folder(run)
        follower.poll()
        status = status_of(follower.records, run.name)
        _say_once(console, status, _age(run), as_json=as_json)
    else:
        with _display(console, as_json=as_json) as show:
            status = _follow(run, follower, show, wait_seconds)
    return int(status.state == "failed")


def as_plain(status: Status) -> dict[str, Any]:
    """The status as JSON takes it."""
    return {str(key): _plain(value) for key, value in asdict(status).items()}


def _follow(run: Path, follower: Follower, show: Show, wait_seconds: float) -> Status:
    """Shows the run whenever its journal has changed, and now and then besides, until it is over; then its status."""
    deadline = time.monotonic() + wait_seconds
    pause, status = _LEAST_PAUSE_SECONDS, status_of([], run.name)
    while True:
        changed = follower.poll()
        if changed:
            status = status_of(follower.records, run.name)
        show(status, _age(run))
        if status.state in _OVER:
            return status
        if not run.is_dir() and time.monotonic() > deadline:
            _require_folder(run)
        pause = _LEAST_PAUSE_SECONDS if changed else min(_MOST_PAUSE_SECONDS, 1.5 * pause)
        time.sleep(pause)


@contextlib.contextmanager
def _display(console: Console, *, as_json: bool) -> Iterator[Show]:
    if as_json:
        yield _once_each(lambda status, _: _write(console, json.dumps(as_plain(status))))
    elif not console.is_terminal:
        yield _once_each(lambda status, silent: _write(console, _line(status, silent)))
    else:
        with Live(console=console, auto_refresh=False, vertical_overflow="crop") as live:
            yield lambda status, silent: live.update(picture(status, silent, *console.size), refresh=True)


def _once_each(show: Show) -> Show:
    """`show` where the status is another than the last one that was shown."""
    last: list[Status] = []

    def shown(status: Status, silent: float) -> None:
        if last != [status]:
            last[:] = [status]
            show(status, silent)

    return shown


def _line(status: Status, silent: float) -> str:
    return round_line(status) if status.state == "running" and status.round else "\n".join(plain_lines(status, silent))


def _say_once(console: Console, status: Status, silent: float, *, as_json: bool) -> None:
    if as_json:
        _write(console, json.dumps(as_plain(status)))
    elif console.is_terminal:
        console.print(picture(status, silent, console.width, 10_000))
    else:
        _write(console, "\n".join(plain_lines(status, silent)))


def _write(console: Console, text: str) -> None:
    console.file.write(f"{text}\n")
    console.file.flush()


def _require_folder(run: Path) -> None:
    if not run.is_dir():
        remedy = "check the path, or start the run"
        raise RunFolderError(sentence(str(run), expected="a run folder", found="none", remedy=remedy))


def _age(run: Path) -> float:
    """The seconds since the journal was last written; 0 where there is none."""
    try:
        return max(0.0, time.time() - (run / "journal.jsonl").stat().st_mtime)
    except OSError:
        return 0.0


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
