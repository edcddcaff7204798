"""A server and two nodes that a test can strike, and runs that `server.run` sees to their end."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import psutil

from fedpeft import journal
from fedpeft.runs import RunFolder
from tests.deployment.federation import NAME, Federation, line, own_process
from tests.deployment.proxy import Counter, counting_proxy
from tests.engines import processes
from tests.engines.conftest import SHRUNK
from tests.engines.lab import lab_in

ROUNDS = 3
PATIENT = (
    f"rounds={ROUNDS}",
    "federation.clients=2",
    "federation.cohort=2",
    "federation.quorum=0",
    "federation.retries=5",
    "federation.wait_seconds=200",
    "federation.deadline_seconds=150",
)
"""Every round is of both nodes, however long one is away."""

RUN_SECONDS = 500.0
NODES = ("node-0", "node-1")
LOGS = ("server", *NODES)


class Line(Protocol):
    """A node's way to the server, which can be cut."""

    @property
    def within(self) -> tuple[str, ...]:
        """What a node's command begins with, so that it has this way."""

    @property
    def address(self) -> str:
        """Where the node finds the server."""

    def cut(self) -> None:
        """From now on nothing passes."""

    def mend(self) -> None:
        """It passes again."""


@dataclass(frozen=True)
class ProxyLine:
    """A way through a proxy of this process; when it is cut, whoever is connected is thrown off."""

    proxy: Counter
    within: tuple[str, ...] = ()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.proxy.port}"

    def cut(self) -> None:
        self.proxy.cut.set()

    def mend(self) -> None:
        self.proxy.cut.clear()


@dataclass
class World:
    """A server, two nodes that reach it by `lines`, and what must be closed in the end."""

    federation: Federation
    lines: tuple[Line, ...]
    servers: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    nodes: dict[int, contextlib.ExitStack] = field(default_factory=dict)

    def start_server(self) -> None:
        self.servers.enter_context(self.federation.server())

    def start_node(self, number: int, command: tuple[str, ...] | None = None) -> None:
        """The node is started by `clients.start`, or by `command`, which takes its file."""
        way, life = self.lines[number], contextlib.ExitStack()
        asked = (*way.within, *(command or line("clients.start")))
        life.enter_context(self.federation.node(NODES[number], number, way.address, command=asked))
        self.nodes[number] = life

    def start_nodes(self) -> None:
        """All nodes run; those that do already are left alone."""
        missing = set(range(len(NODES))) - self.nodes.keys()
        for number in missing:
            self.start_node(number)
        if missing:
            self.wait_for_nodes()

    def wait_for_nodes(self) -> None:
        self.federation.wait_for(*NODES)

    def stop_node(self, number: int) -> None:
        self.nodes.pop(number).close()

    def stop_all(self) -> None:
        for number in list(self.nodes):
            self.stop_node(number)
        self.servers.close()
        self.servers = contextlib.ExitStack()

    def child(self, name: str) -> int:
        """The process that the script of `name` keeps running."""
        return own_process(self.federation.log(name), "superlink" if name == "server" else "node")

    def server_app(self) -> list[psutil.Process]:
        """The processes of the run's server, which merges; not the SuperLink."""
        return [
            process
            for process in psutil.Process(self.child("server")).children(recursive=True)
            if process.status() != psutil.STATUS_ZOMBIE and any("flwr-serverapp" in word for word in process.cmdline())
        ]

    def run(self, out: Path, *overrides: str, strike: Callable[[World], None] | None = None) -> str:
        """What `server.run` says of a run in `out`, which `strike` hits once its first round is on record."""
        self.start_nodes()
        lab, log = self.federation.lab, self.federation.log(out.name)
        sets = [word for item in (*SHRUNK, *PATIENT, *overrides) for word in ("--set", item)]
        asked = line("server.run", "simulations/demo.toml", "--out", out, "--name", NAME, *sets)
        env = {**lab.env, "FLWR_HOME": str(self.federation.home)}
        logs = (log, *map(self.federation.log, LOGS))
        with processes.started([*self.federation.within, *asked], env, lab.app, log) as process:
            if strike:
                processes.until(lambda: rounds(out) or None, RUN_SECONDS, "first round", *logs)
                strike(self)
            try:
                status = process.wait(RUN_SECONDS)
            except subprocess.TimeoutExpired:
                status = None
        said = log.read_text(errors="replace")
        tails = "\n".join(f"--- {one}\n{one.read_text(errors='replace')[-3000:]}" for one in logs)
        assert status == 0, f"exit status {status}\n{tails}"
        return said


def rounds(out: Path) -> list[dict[str, Any]]:
    path = RunFolder(out).journal
    return [record for record in journal.read(path) if record["event"] == "round"] if path.exists() else []


def timeless(value: Any) -> Any:
    """A record of the journal without what the clock says."""
    if isinstance(value, dict):
        clock = ("seconds", "time")
        return {key: timeless(item) for key, item in value.items() if key not in clock and "seconds" not in key}
    return [timeless(item) for item in value] if isinstance(value, list) else value


@contextlib.contextmanager
def proxied() -> Iterator[World]:
    """A world on the loopback, whose nodes go through proxies."""
    folder = Path(tempfile.mkdtemp(prefix="fp"))
    (port,) = processes.free_ports(1)
    federation = Federation(lab_in(folder), port)
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        lines = tuple(ProxyLine(stack.enter_context(counting_proxy(port))) for _ in NODES)
        yield stack.enter_context(running(World(federation, lines)))


@contextlib.contextmanager
def running(world: World) -> Iterator[World]:
    """Inside, the world's server and nodes run; its certificate is valid for its host."""
    federation = world.federation
    federation.script("server.make_certificates", federation.keys, "--nodes", len(NODES), "--host", federation.host)
    try:
        world.start_server()
        for name in NODES:
            federation.script("server.nodes", "add", federation.keys / f"{name}.pub")
        world.start_nodes()
        yield world
    finally:
        world.stop_all()
