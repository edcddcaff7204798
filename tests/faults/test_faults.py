"""Faults in a real deployment: whatever is killed or cut, the run ends, and where the same nodes take part, alike.

Server and nodes run as an operator starts them. Each fault strikes a run of its own once its first round is on
record; `server.run` sees the run to its end. `FEDPEFT_FAULTS=all` is the long form, with all of them.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from fedpeft import journal
from fedpeft.runs import RunFolder
from tests.deployment.federation import NAME, Federation, line, own_process
from tests.deployment.proxy import Counter, counting_proxy
from tests.engines import processes
from tests.engines.conftest import SHRUNK, adapter
from tests.engines.lab import lab_in

pytestmark = [pytest.mark.engines, pytest.mark.assets, pytest.mark.faults]

ROUNDS = 4
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


@dataclass
class World:
    """A server, two nodes that reach it by proxies which can be cut, and what must be closed in the end."""

    federation: Federation
    proxies: list[Counter]
    stack: contextlib.ExitStack
    servers: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    nodes: list[contextlib.ExitStack] = field(default_factory=list)

    def start_server(self) -> None:
        self.servers.enter_context(self.federation.server())

    def start_nodes(self) -> None:
        for number, name in enumerate(NODES):
            life = contextlib.ExitStack()
            life.enter_context(self.federation.node(name, number, self.proxies[number].port, warm=True))
            self.nodes.append(life)
        logs = map(self.federation.log, NODES)
        processes.until(lambda: self.federation.joined(*NODES), 200, "nodes online", *logs)

    def stop_all(self) -> None:
        for life in (*self.nodes, self.servers):
            life.close()
        self.nodes, self.servers = [], contextlib.ExitStack()

    def child(self, name: str) -> int:
        """The process that the script of `name` keeps running."""
        return own_process(self.federation.log(name), "superlink" if name == "server" else "node")

    def run(self, out: Path, *overrides: str, strike: Callable[[World], None] | None = None) -> str:
        """What `server.run` says of a run in `out`, which `strike` hits once its first round is on record."""
        lab, log = self.federation.lab, out.with_suffix(".log")
        sets = [word for item in (*SHRUNK, *PATIENT, *overrides) for word in ("--set", item)]
        asked = line("server.run", "simulations/demo.toml", "--out", out, "--name", NAME, *sets)
        env = {**lab.env, "FLWR_HOME": str(self.federation.home)}
        logs = (log, *map(self.federation.log, LOGS))
        with processes.started(asked, env, lab.app, log) as process:
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
    if isinstance(value, dict):
        return {key: timeless(item) for key, item in value.items() if key not in ("seconds", "time")}
    return [timeless(item) for item in value] if isinstance(value, list) else value


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    folder = Path(tempfile.mkdtemp(prefix="fp"))
    (port,) = processes.free_ports(1)
    federation = Federation(lab_in(folder), port)
    federation.script("server.make_certificates", federation.keys, "--nodes", 2)
    with contextlib.ExitStack() as stack:
        found = World(federation, [stack.enter_context(counting_proxy(port)) for _ in NODES], stack)
        stack.callback(found.stop_all)
        found.start_server()
        for name in NODES:
            federation.script("server.nodes", "add", federation.keys / f"{name}.pub")
        found.start_nodes()
        yield found
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def calm(world: World) -> Path:
    """A run that nothing befell."""
    out = world.federation.lab.root / "calm"
    assert "cut off" not in world.run(out)
    return out


def test_nodes_that_stay_warm_give_the_bytes_of_the_in_process_engine(
    calm: Path, in_process: Callable[..., bytes]
) -> None:
    assert adapter(calm) == in_process(*PATIENT)


def test_a_node_that_stays_warm_loads_the_base_once(world: World, calm: Path) -> None:
    for name in NODES:
        found = re.findall(r"round (\d+): ([\d.]+) s of work", world.federation.log(name).read_text(errors="replace"))
        work = {int(number): float(seconds) for number, seconds in found[: ROUNDS + 1]}
        assert set(work) == set(range(ROUNDS + 1))
        later = statistics.median(work[number] for number in range(2, ROUNDS + 1))
        assert later < work[1], "only the first round loads the base"


def kill_node(world: World) -> None:
    """In the middle of its work."""
    os.kill(world.child("node-1"), signal.SIGKILL)


def cut_network(world: World) -> None:
    """Both ways, both nodes."""
    for proxy in world.proxies:
        proxy.cut.set()
    time.sleep(8)
    for proxy in world.proxies:
        proxy.cut.clear()


def slow_node(world: World) -> None:
    """A node that does nothing at all for a while."""
    node = world.child("node-0")
    os.kill(node, signal.SIGSTOP)
    time.sleep(6)
    os.kill(node, signal.SIGCONT)


def kill_server_app(world: World) -> None:
    """The process that merges, not the SuperLink."""
    own = [
        process
        for process in psutil.Process(world.child("server")).children(recursive=True)
        if process.status() != psutil.STATUS_ZOMBIE and any("flwr-serverapp" in word for word in process.cmdline())
    ]
    assert own
    for process in own:
        process.kill()


def kill_superlink(world: World) -> None:
    """And with it the run."""
    os.kill(world.child("server"), signal.SIGKILL)


def reboot(world: World) -> None:
    """Everything is gone, and started again."""
    world.stop_all()
    world.start_server()
    world.start_nodes()


FAULTS: dict[str, tuple[Callable[[World], None], bool]] = {
    "network cut": (cut_network, True),
    "slow node": (slow_node, True),
    "server app killed": (kill_server_app, False),
    "node killed": (kill_node, True),
    "superlink killed": (kill_superlink, True),
    "machines rebooted": (reboot, True),
}
"""What strikes, and whether it is left to the long form."""

CHOSEN = [name for name, (_, long) in FAULTS.items() if not long or os.environ.get("FEDPEFT_FAULTS") == "all"]


@pytest.mark.parametrize("fault", CHOSEN)
def test_the_run_ends_as_if_nothing_had_happened(world: World, calm: Path, fault: str) -> None:
    out = world.federation.lab.root / fault.replace(" ", "-")
    before: list[dict[str, Any]] = []

    def strike(world: World) -> None:
        before.extend(rounds(out))
        FAULTS[fault][0](world)

    world.run(out, strike=strike)
    after = rounds(out)
    assert [record["round"] for record in after] == list(range(1, ROUNDS + 1))
    assert [timeless(record) for record in after[: len(before)]] == [timeless(record) for record in before]
    assert adapter(out) == adapter(calm)
    assert len(before) < ROUNDS, "the run was over before the fault struck"


def test_without_one_of_its_nodes_a_run_goes_on_and_takes_it_back_when_it_returns(world: World, calm: Path) -> None:
    out = world.federation.lab.root / "lost"
    impatient = ("federation.quorum=1", "federation.retries=0", "federation.wait_seconds=0", "rounds=12")
    lost = world.child("node-1")

    def strike(world: World) -> None:
        os.kill(lost, signal.SIGSTOP)
        done = len(rounds(out))
        processes.until(
            lambda: len(rounds(out)) >= done + 2 or None, RUN_SECONDS, "two rounds", out.with_suffix(".log")
        )
        os.kill(lost, signal.SIGCONT)

    world.run(out, *impatient, "federation.deadline_seconds=10", strike=strike)
    took_part = [[client["partition"] for client in record["clients"]] for record in rounds(out)]
    assert len(took_part) == 12
    assert [0] in took_part
    assert took_part[-1] == [0, 1]
    missed = [failure for record in rounds(out) for failure in record["failures"]]
    assert {failure["partition"] for failure in missed} == {1}
    assert {failure["kind"] for failure in missed} == {"absent"}
