from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from fedpeft.errors import ConfigError, FederationError
from fedpeft.supervision import Child, Pauses, keep_running, require_well

QUICK = Pauses(first=0.05, most=0.2, steady=60.0)


def python(name: str, code: str, explain: Callable[[str], str] = lambda line: "") -> Child:
    return Child(name, (sys.executable, "-c", code), explain)


def stop_when(met: Callable[[], bool], seconds: float = 20.0) -> threading.Thread:
    """Sends this process SIGTERM once `met`, or after the time."""

    def wait() -> None:
        deadline = time.monotonic() + seconds
        while not met() and time.monotonic() < deadline:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def test_a_child_that_ends_is_started_again_after_growing_pauses_and_its_reason_told() -> None:
    said: list[str] = []
    child = python("node", "print('code 7'); raise SystemExit(1)", lambda line: "a bad day" * ("code 7" in line))
    waiter = stop_when(lambda: sum("ended" in line for line in said) >= 3)
    keep_running([child], os.environ, said.append, QUICK)
    waiter.join()
    ends = [line for line in said if "ended" in line]
    assert len([line for line in said if "started, process" in line]) >= 3
    assert all("ended with exit status 1: a bad day; starts again in" in line for line in ends)


def test_pauses_double_up_to_the_most() -> None:
    assert [Pauses(1.0, 5.0, 9.0).after(ends) for ends in (1, 2, 3, 4, 400)] == [1.0, 2.0, 4.0, 5.0, 5.0]


def test_a_signal_stops_all_children_and_what_they_started(tmp_path: Path) -> None:
    said: list[str] = []
    code = (
        "import pathlib, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(300)'])\n"
        "pathlib.Path(sys.argv[1]).write_text(str(child.pid))\n"
        "time.sleep(300)\n"
    )
    pids = [tmp_path / "a", tmp_path / "b"]
    children = [Child(path.name, (sys.executable, "-c", code, str(path))) for path in pids]
    waiter = stop_when(lambda: all(path.exists() and path.read_text() for path in pids))
    began = time.monotonic()
    keep_running(children, os.environ, said.append, QUICK)
    waiter.join()
    assert time.monotonic() - began < 15
    assert {"a: stopped", "b: stopped"} <= set(said)
    for path in pids:
        deadline = time.monotonic() + 5
        while _alive(int(path.read_text())) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not _alive(int(path.read_text()))


def test_a_command_line_that_is_not_understood_is_not_tried_again() -> None:
    said: list[str] = []
    with pytest.raises(FederationError, match="node: expected a command line that it understands"):
        keep_running([python("node", "raise SystemExit(2)")], os.environ, said.append, QUICK)
    assert sum("started" in line for line in said) == 1


def test_a_program_that_is_not_there_is_told_before_anything_starts() -> None:
    said: list[str] = []
    with pytest.raises(ConfigError, match="expected the program no-such-program, found none"):
        keep_running([Child("node", ("no-such-program",))], os.environ, said.append, QUICK)
    assert not said


def test_handlers_of_signals_are_as_they_were_afterwards() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(FederationError):
        keep_running([python("node", "raise SystemExit(2)")], os.environ, lambda line: None, QUICK)
    assert signal.getsignal(signal.SIGTERM) is before


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


@contextmanager
def answering(status: int) -> Iterator[str]:
    """The address of a process that answers every request with `status`."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()


def test_a_process_that_answers_is_well_and_another_is_told_in_a_sentence() -> None:
    with answering(200) as address:
        require_well(f"http://{address}/health", "a node")
    with pytest.raises(FederationError, match=f"{address}: expected a node that answers, found .*refused; see its log"):
        require_well(f"http://{address}/health", "a node")
    with (
        answering(503) as ill,
        pytest.raises(FederationError, match=f"{ill}: expected a server that answers, found Ser"),
    ):
        require_well(f"http://{ill}/health", "a server")
