"""What a round costs nodes besides training, in a deployment on this machine: a server and nodes on TLS.

    python -m simulations.benchmarks.nodes
    python -m simulations.benchmarks.nodes --supernode

The first is of nodes that keep the base in memory, the second of Flower's own SuperNodes. The demo's sites train as in
the demo. A figure is of every round but the first, in which a node loads the base.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated

import typer

from fedpeft import journal
from fedpeft.cli import script
from fedpeft.errors import FederationError

_WAIT_SECONDS = 300.0
_LINE = re.compile(r"round (\d+): ([\d.]+) s of work, ([\d.]+) s to receive it, ([\d.]+) s to send the answer")
ROOT = Path(__file__).resolve().parents[2]


def main(
    nodes: Annotated[int, typer.Option(min=1, help="How many nodes train at once; each has one thread.")] = 1,
    rounds: Annotated[int, typer.Option(min=2, help="Rounds, the first of which does not count.")] = 6,
    supernode: Annotated[bool, typer.Option("--supernode", help="Flower's own SuperNodes.")] = False,
) -> None:
    """Run the demo's rounds on a deployment and print the seconds of training and of everything else."""
    folder = Path(tempfile.mkdtemp(prefix="fp"))
    env = {**os.environ, "FLWR_HOME": str(folder / "home")}
    try:
        with contextlib.ExitStack() as stack:
            _deploy(stack, folder, env, nodes, supernode)
            sets = [
                f"rounds={rounds}",
                f"federation.clients={nodes}",
                f"federation.cohort={nodes}",
                "evaluation.every=0",
            ]
            sets += ["federation.quorum=0", "compute.threads=1"]
            words = [word for item in sets for word in ("--set", item)]
            _run(["server.run", "simulations/demo.toml", "--out", str(folder / "run"), *words], env)
        records = [one for one in journal.read(folder / "run" / "journal.jsonl") if one["event"] == "round"][1:]
        work = [max(client["seconds"] for client in record["clients"]) for record in records]
        whole = [record["seconds"]["exchange"] for record in records]
        typer.echo(
            f"a round: {statistics.median(whole):.2f} s, of which {statistics.median(work):.2f} s of work on nodes"
        )
        for number in range(nodes):
            typer.echo(_told(number, (folder / f"node-{number}.log").read_text(errors="replace")))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _deploy(stack: contextlib.ExitStack, folder: Path, env: dict[str, str], nodes: int, supernode: bool) -> None:
    """A server and nodes run, and all have joined."""
    keys, port = folder / "keys", _free_port()
    _run(["server.make_certificates", str(keys), "--nodes", str(nodes)], env)
    stack.enter_context(
        _started(["server.start", "--keys", str(keys), "--port", str(port)], env, folder / "server.log")
    )
    _until(lambda: _listens(port))
    for number in range(nodes):
        _run(["server.nodes", "add", str(keys / f"node-{number}.pub")], env)
        file = keys / f"node-{number}.toml"
        file.write_text(
            f'partition = {number}\nport = {_free_port()}\n[server]\naddress = "127.0.0.1:{port}"\n'
            f'root_certificates = "ca.crt"\nprivate_key = "node-{number}"\n'
        )
        asked = ["clients.start", str(file), *(["--supernode"] if supernode else [])]
        own = {**env, "FLWR_HOME": str(folder / f"home-{number}")}
        stack.enter_context(_started(asked, own, folder / f"node-{number}.log"))
    _until(lambda: _output(["server.nodes", "list"], env).count("online") == nodes)


def _told(number: int, log: str) -> str:
    """A line on what one node logged of its rounds."""
    found = [tuple(map(float, row)) for row in _LINE.findall(log)]
    beside = [(receive + send) / (work + receive + send) for round_, work, receive, send in found if round_ > 1]
    if not beside:
        return f"node {number}: logs no seconds"
    return (
        f"node {number}: {100 * statistics.median(beside):.1f} % of its time on a message was not work "
        f"({100 * min(beside):.1f} to {100 * max(beside):.1f} %, {len(beside)} rounds)"
    )


@contextlib.contextmanager
def _started(words: Sequence[str], env: dict[str, str], log: Path) -> Iterator[None]:
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", *words], cwd=ROOT, env=env, stdout=file, stderr=subprocess.STDOUT
        )
        try:
            yield
        finally:
            process.terminate()
            process.wait(30)


def _run(words: Sequence[str], env: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", *words], cwd=ROOT, env=env, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise FederationError(f"{words[0]}: {(done.stderr or done.stdout).strip()[-500:]}")


def _output(words: Sequence[str], env: dict[str, str]) -> str:
    return subprocess.run([sys.executable, "-m", *words], cwd=ROOT, env=env, capture_output=True, text=True).stdout


def _until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _WAIT_SECONDS
    while not holds():
        if time.monotonic() > deadline:
            raise FederationError(f"expected server and nodes within {_WAIT_SECONDS:g} seconds, found them not ready.")
        time.sleep(0.5)


def _listens(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    script(main)
