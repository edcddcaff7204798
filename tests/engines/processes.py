"""Processes that a test starts, waits for a bounded time, and kills."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import psutil

T = TypeVar("T")


def free_ports(count: int) -> list[int]:
    """Ports of the loopback that nobody listens on now."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def command(name: str, *arguments: object) -> list[str]:
    """The command line of a program that is installed beside this Python."""
    return [str(Path(sys.executable).parent / name), *map(str, arguments)]


def run(line: Sequence[str], env: Mapping[str, str], folder: Path, seconds: float = 60.0) -> str:
    """What a command prints that must end well within the time."""
    done = subprocess.run(
        line,
        env=env,
        cwd=folder,
        timeout=seconds,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{' '.join(line)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@contextlib.contextmanager
def started(line: Sequence[str], env: Mapping[str, str], folder: Path, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The command runs inside, its output in `log`; after, it and all that it started are gone."""
    with log.open("wb") as file:
        process = subprocess.Popen(
            line,
            env=env,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        end(process.pid)
        process.wait(10)


def end(pid: int, seconds: float = 10.0) -> None:
    """The process `pid` and all that descend from it are gone, asked politely first."""
    try:
        parent = psutil.Process(pid)
        family = [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    parent.send_signal(signal.SIGTERM)
    _, alive = psutil.wait_procs(family, timeout=seconds)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=seconds)


def mentioning(text: str) -> list[int]:
    """Processes, other than this one, with `text` in their command line."""
    found = []
    for process in psutil.process_iter(["pid", "cmdline"]):
        if process.pid != os.getpid() and text in " ".join(process.info["cmdline"] or []):
            found.append(process.pid)
    return found


def until(answer: Callable[[], T | None], seconds: float, what: str, *logs: Path, pause: float = 0.5) -> T:
    """The first answer that is not None, asked for every `pause`; past `seconds` the test fails with the logs."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = answer()
        if found is not None:
            return found
        time.sleep(pause)
    tails = "\n".join(f"--- {log}\n{log.read_text(errors='replace')[-3000:]}" for log in logs if log.exists())
    raise AssertionError(f"no {what} within {seconds:g} seconds\n{tails}")


def listening(port: int) -> bool | None:
    """True once somebody accepts connections at `port` of the loopback."""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return None
