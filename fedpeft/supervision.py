"""Processes that are kept running: one that ends is started again, after a pause that grows, until told to stop."""

from __future__ import annotations

import contextlib
import os
import signal
import ssl
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedpeft.errors import ConfigError, FederationError, sentence

Say = Callable[[str], None]

BAD_COMMAND_LINE = 2
"""The exit status of a program that does not understand how it was called: to start it again would not help."""

_POLL_SECONDS = 0.1
_STOP_SECONDS = 10.0
_ANSWER_SECONDS = 5.0


def require_well(url: str, who: str, context: ssl.SSLContext | None = None) -> None:
    """`who` answers at `url`.

    Raises:
        FederationError: it does not.
    """
    try:
        urllib.request.urlopen(url, timeout=_ANSWER_SECONDS, context=context).close()
    except OSError as error:
        found = getattr(error, "reason", error)
        raise FederationError(
            sentence(url.split("/")[2], expected=f"{who} that answers", found=found, remedy="see its log")
        ) from error


def silent(line: str) -> str:
    """No line of output means anything to an operator."""
    del line
    return ""


@dataclass(frozen=True)
class Child:
    """A process to keep running: its name, its command line, and what a line of its output tells an operator.

    `explain(line)` is one clause without a full stop, or empty where the line is none that explains an end.
    """

    name: str
    line: tuple[str, ...]
    explain: Callable[[str], str] = silent


@dataclass(frozen=True)
class Pauses:
    """Seconds before a process is started again: the first, doubled at each end, up to `most`.

    A process that has run for `steady` seconds begins with the first pause again.
    """

    first: float = 1.0
    most: float = 30.0
    steady: float = 120.0

    def after(self, ends: int) -> float:
        """The pause after `ends` ends in a row."""
        return min(self.most, self.first * 2.0 ** min(ends - 1, 30))


def keep_running(children: Sequence[Child], env: Mapping[str, str], say: Say, pauses: Pauses | None = None) -> None:
    """All `children` have run until SIGTERM or SIGINT came; then they were stopped, and all that they had started.

    `say` takes one line for each thing that happens. What the children print goes to this process's output. Call it
    from the main thread: it listens for the two signals while it runs.

    Raises:
        ConfigError: a program is not there.
        FederationError: a program does not understand its command line; all children are stopped.
    """
    stop = threading.Event()
    rejected: list[str] = []

    def keep(child: Child) -> None:
        if not _keep(child, dict(env), say, pauses or Pauses(), stop):
            rejected.append(child.name)
            stop.set()

    for child in children:
        _require_program(child, env)
    with _signals_set(stop):
        threads = [threading.Thread(target=keep, args=(child,), name=child.name) for child in children]
        for thread in threads:
            thread.start()
        # In steps, because a signal's handler runs only between them.
        while any(thread.is_alive() for thread in threads):
            for thread in threads:
                thread.join(_POLL_SECONDS)
    if rejected:
        raise FederationError(
            sentence(
                rejected[0],
                expected="a command line that it understands",
                found=f"exit status {BAD_COMMAND_LINE}",
                remedy="read its message above",
            )
        )


def _require_program(child: Child, env: Mapping[str, str]) -> None:
    folders = [Path(folder) for folder in env.get("PATH", os.defpath).split(os.pathsep)]
    program = child.line[0]
    if not any(os.access(folder / program, os.X_OK) for folder in folders):
        remedy = "install fedpeft's requirements into this Python's environment"
        raise ConfigError(sentence(child.name, expected=f"the program {program}", found="none", remedy=remedy))


@contextlib.contextmanager
def _signals_set(stop: threading.Event) -> Iterator[None]:
    """SIGTERM and SIGINT set `stop` inside."""
    before = {each: signal.signal(each, lambda *_: stop.set()) for each in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def _keep(child: Child, env: dict[str, str], say: Say, pauses: Pauses, stop: threading.Event) -> bool:
    """Keeps one child running until `stop`; False where it does not understand its command line."""
    ends = 0
    while not stop.is_set():
        began, reasons = time.monotonic(), [""]
        status = _run_once(child, env, say, stop, reasons)
        if stop.is_set():
            say(f"{child.name}: stopped")
            return True
        if status == BAD_COMMAND_LINE:
            return False
        ends = 1 if time.monotonic() - began > pauses.steady else ends + 1
        pause = pauses.after(ends)
        why = f": {reasons[-1]}" if reasons[-1] else ""
        say(f"{child.name}: ended with {_how(status)}{why}; starts again in {pause:.0f} s")
        stop.wait(pause)
    return True


def _run_once(child: Child, env: dict[str, str], say: Say, stop: threading.Event, reasons: list[str]) -> int:
    """The exit status of one life of a child, which ends by itself or with `stop`; `reasons` gets what it explained."""
    process = subprocess.Popen(
        child.line,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    say(f"{child.name}: started, process {process.pid}")
    reader = threading.Thread(target=_pass_on, args=(process, child.explain, reasons), daemon=True)
    reader.start()
    while process.poll() is None and not stop.wait(_POLL_SECONDS):
        pass
    _end(process)
    # Something that the child has left behind may hold its output open; nobody waits for that.
    reader.join(1.0)
    return process.returncode


def _pass_on(process: subprocess.Popen[bytes], explain: Callable[[str], str], reasons: list[str]) -> None:
    if process.stdout is None:
        return
    with process.stdout as output:
        for raw in output:
            line = raw.decode(errors="replace")
            with contextlib.suppress(ValueError, OSError):
                sys.stdout.write(line)
                sys.stdout.flush()
            reasons.extend(filter(None, [explain(line)]))


def _end(process: subprocess.Popen[bytes]) -> None:
    """The process and its session are gone: asked first, and killed where that does not help."""
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_STOP_SECONDS)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _how(status: int) -> str:
    return f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
