"""Faults in a real deployment: whatever is killed or cut, the run ends, and where the same nodes take part, alike.

Server and nodes run as an operator starts them. Each fault strikes a run of its own once its first round is on
record; `server.run` sees the run to its end. `FEDPEFT_FAULTS=all` is the long form, with all of them.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedpeft import journal
from fedpeft.runs import RunFolder
from tests.deployment.federation import Federation
from tests.engines import processes
from tests.engines.conftest import adapter
from tests.engines.lab import lab_in
from tests.faults import namespaces
from tests.faults.world import NODES, PATIENT, ROUNDS, RUN_SECONDS, ProxyLine, World, rounds, running, timeless

pytestmark = [pytest.mark.engines, pytest.mark.assets, pytest.mark.faults]

LONG = pytest.mark.skipif(os.environ.get("FEDPEFT_FAULTS") != "all", reason="in the long form: FEDPEFT_FAULTS=all")
CUT_SECONDS = 5.0


def test_nodes_that_stay_warm_give_the_bytes_of_the_in_process_engine(
    calm: Path, in_process: Callable[..., bytes]
) -> None:
    assert adapter(calm) == in_process(*PATIENT)


def kill_node(world: World) -> None:
    """In the middle of its work."""
    os.kill(world.child("node-1"), signal.SIGKILL)


def cut_network(world: World) -> None:
    """Both ways, both nodes."""
    for way in world.lines:
        way.cut()
    time.sleep(CUT_SECONDS)
    for way in world.lines:
        way.mend()


def slow_node(world: World) -> None:
    """A node that does nothing at all for a while."""
    node = world.child("node-0")
    os.kill(node, signal.SIGSTOP)
    time.sleep(CUT_SECONDS)
    os.kill(node, signal.SIGCONT)


def kill_server_app(world: World) -> None:
    """The process that merges, not the SuperLink."""
    own = world.server_app()
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


FAULTS: dict[str, Callable[[World], None]] = {
    "network cut": cut_network,
    "slow node": slow_node,
    "node killed": kill_node,
    "superlink killed": kill_superlink,
    "machines rebooted": reboot,
}
"""What strikes in the long form."""


def struck(world: World, calm: Path, fault: Callable[[World], None]) -> str:
    """What `server.run` says of a run that `fault` has struck; it has ended like the calm one, nothing done twice."""
    out = world.federation.lab.root / fault.__name__
    before: list[dict[str, Any]] = []

    def strike(world: World) -> None:
        before.extend(rounds(out))
        fault(world)

    said = world.run(out, strike=strike)
    after = rounds(out)
    assert [record["round"] for record in after] == list(range(1, ROUNDS + 1))
    assert [timeless(record) for record in after[: len(before)]] == [timeless(record) for record in before]
    assert adapter(out) == adapter(calm)
    assert len(before) < ROUNDS, "the run was over before the fault struck"
    return said


def test_when_the_process_of_the_runs_server_is_killed_the_run_goes_on_with_nodes_that_are_still_warm(
    world: World, calm: Path
) -> None:
    assert "the process of the run's server is gone" in struck(world, calm, kill_server_app)
    for name in NODES:
        said = world.federation.log(name).read_text(errors="replace")
        first, *later = [float(seconds) for seconds in re.findall(r"round 0: ([\d.]+) s of work", said)]
        assert min(later) < first / 4, "only the first introduction loads the base"


@LONG
@pytest.mark.parametrize("fault", FAULTS)
def test_the_run_ends_as_if_nothing_had_happened(world: World, calm: Path, fault: str) -> None:
    struck(world, calm, FAULTS[fault])


@LONG
@pytest.mark.skipif(not namespaces.possible(), reason="needs the right to make network namespaces; proxies stand in")
def test_a_cut_between_machines_of_their_own_costs_no_more_than_it_lasts(calm: Path) -> None:
    folder = Path(tempfile.mkdtemp(prefix="fp"))
    (port,) = processes.free_ports(1)
    with namespaces.links(len(NODES), port) as (within, lines):
        federation = Federation(lab_in(folder), port, namespaces.SERVER_ADDRESS, within)
        with running(World(federation, lines)) as apart:
            struck(apart, calm, cut_network)
            out = federation.lab.root / cut_network.__name__
            assert not [failure for record in rounds(out) for failure in record["failures"]]
    shutil.rmtree(folder, ignore_errors=True)


def working(world: World, number: int) -> None:
    """Returns once the node has been sent a request, on which it is at work then."""
    way = world.lines[number]
    assert isinstance(way, ProxyLine)
    before = way.proxy.down
    processes.until(lambda: way.proxy.down > before + 100_000 or None, RUN_SECONDS, "request", pause=0.02)


def test_without_one_of_its_nodes_a_run_goes_on_and_what_comes_too_late_is_not_counted(
    world: World, calm: Path
) -> None:
    out, log = world.federation.lab.root / "late", world.federation.log("node-1")
    impatient = ("federation.quorum=1", "federation.retries=0", "federation.wait_seconds=0", "rounds=7")
    missed: list[int] = []
    before = len(log.read_text())

    def strike(world: World) -> None:
        working(world, 1)
        frozen = world.child("node-1")
        os.kill(frozen, signal.SIGSTOP)
        missed.append(len(rounds(out)) + 1)
        processes.until(lambda: len(rounds(out)) >= missed[0] or None, RUN_SECONDS, "a round", log)
        os.kill(frozen, signal.SIGCONT)

    world.run(out, *impatient, "federation.deadline_seconds=8", strike=strike)
    found = rounds(out)
    assert [record["round"] for record in found] == list(range(1, 8))
    took_part = [[client["partition"] for client in record["clients"]] for record in found]
    assert took_part[missed[0] - 1] == [0]
    assert took_part[-1] == [0, 1]
    assert all(partitions in ([0], [0, 1]) for partitions in took_part)
    failures = [failure for record in found for failure in record["failures"]]
    assert {(failure["partition"], failure["kind"]) for failure in failures} == {(1, "absent")}
    assert f"round {missed[0]}: " in log.read_text()[before:], "the answer came all the same"
    end = journal.read(RunFolder(out).journal)[-1]
    assert end["bytes_up"] == sum(client["bytes_up"] for record in found for client in record["clients"])
