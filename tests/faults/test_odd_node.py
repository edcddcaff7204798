"""A real node that sends its answer twice, and one that attacks: over a SuperLink, beside an honest one."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from fedpeft.config import RunConfig
from fedpeft.engines.local import LocalTransport
from fedpeft.experiment import site_of
from fedpeft.federate import federate
from fedpeft.memory import FolderMemory
from fedpeft.runs import RunFolder
from fedpeft.wire import Failure, Packet
from tests.engines import processes
from tests.engines.conftest import adapter
from tests.faults import odd_node
from tests.faults.world import PATIENT, RUN_SECONDS, World, rounds

pytestmark = [pytest.mark.engines, pytest.mark.assets, pytest.mark.faults]

WAYS = ("twice", "bomb", "many", "half", "huge", "honest")
"""What the node does in each round."""

REASONS = {
    "bomb": ("refused", "payload layout: expected fedpeft.raw/v1"),
    "many": ("refused", "expected at most 1024 parts"),
    "half": ("absent", "no answer within the deadline"),
    "huge": ("refused", "bytes, found more"),
}
PLAN = (
    f"rounds={len(WAYS)}",
    "federation.quorum=1",
    "federation.retries=0",
    "federation.failures.budget=100",
    "federation.deadline_seconds=10",
)
MOST_GROWTH_BYTES = 40 * 10**6
"""What the process of the run's server may grow, whatever a node sends; the longest answer is of 63 MB."""


@pytest.fixture
def odd(world: World) -> Iterator[None]:
    """The second node is the odd one, until the test is over."""
    world.stop_node(1)
    world.start_node(1, (sys.executable, str(Path(odd_node.__file__)), ",".join(WAYS)))
    world.wait_for_nodes()
    yield
    world.stop_node(1)


@pytest.fixture
def run(world: World, odd: None) -> tuple[Path, list[int]]:
    """A run with it, and the most memory that the run's server had held, from the first round to the last but one."""
    out = world.federation.lab.root / "odd"
    peaks: list[int] = []

    def look() -> bool | None:
        peaks.extend(filter(None, map(peak_bytes, world.server_app())))
        return True if len(rounds(out)) >= len(WAYS) - 1 else None

    world.run(out, *PLAN, strike=lambda _: processes.until(look, RUN_SECONDS, "end", pause=0.2) and None)
    return out, peaks


@dataclass(frozen=True)
class WithoutAttacks:
    """The in-process engine, but what the second node sends in a round of an attack is a failure."""

    inner: LocalTransport

    def partitions(self) -> tuple[int, ...]:
        return self.inner.partitions()

    def exchange(
        self, requests: Mapping[int, Packet], timeout_seconds: float
    ) -> Iterator[tuple[int, Packet | Failure]]:
        for partition, reply in self.inner.exchange(requests, timeout_seconds):
            way = WAYS[int(requests[partition].manifest["round"]) - 1] if requests[partition].kind == "fit" else ""
            yield partition, Failure("attacked") if partition == 1 and way in REASONS else reply

    def late(self) -> Iterator[tuple[int, Packet | Failure]]:
        return self.inner.late()


@pytest.fixture
def expected(demo: Callable[..., tuple[RunConfig, RunFolder]]) -> bytes:
    """The adapter of a run that nobody attacked, and where nothing came twice."""
    config, folder = demo("without-attacks", *PATIENT, *PLAN)
    local = LocalTransport(2, lambda partition: site_of(config, partition), FolderMemory(folder.memories))
    federate(config, folder, WithoutAttacks(local), engine="local")
    return adapter(folder.root)


def peak_bytes(process: psutil.Process) -> int:
    """The most memory that a process has held; 0 where it has ended."""
    try:
        (line,) = [line for line in Path(f"/proc/{process.pid}/status").read_text().splitlines() if "VmHWM" in line]
    except (OSError, ValueError):
        return 0
    return 1024 * int(line.split()[1])


def test_an_answer_sent_twice_is_merged_once_and_attacks_are_failures_of_one_node(
    run: tuple[Path, list[int]], expected: bytes
) -> None:
    out, peaks = run
    for way, record in zip(WAYS, rounds(out), strict=True):
        told = [(failure["partition"], failure["kind"]) for failure in record["failures"]]
        took_part = [client["partition"] for client in record["clients"]]
        kind, words = REASONS.get(way, ("", ""))
        assert (way, told, took_part) == (way, [(1, kind)] if kind else [], [0] if kind else [0, 1])
        assert not words or words in record["failures"][0]["reason"]
    assert adapter(out) == expected
    assert peaks[-1] - peaks[0] < MOST_GROWTH_BYTES
