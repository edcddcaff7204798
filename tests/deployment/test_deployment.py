"""A server and three nodes as an operator starts them, on TLS with node keys, while two strangers knock."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest

from fedpeft import journal
from fedpeft.runs import RunFolder
from tests.deployment.federation import NAME, Federation, own_process, rank
from tests.deployment.proxy import Counter, counting_proxy
from tests.engines import processes

pytestmark = [pytest.mark.engines, pytest.mark.assets]
NODES = ("node-0", "node-1", "node-2")
THREE = (
    "rounds=1",
    "federation.clients=3",
    "federation.cohort=3",
    "federation.ranks=declared",
    f"adapter.lora.rank={rank(2)}",
)
MOST_OVERHEAD = 0.03
"""Of the payload that the journal counts, what may cross besides; what idle nodes ask, and the app, are not in it."""

IDLE_SECONDS = 12.0


@dataclass(frozen=True)
class Seen:
    """A run's journal, and the bytes that crossed to (down) and from (up) the nodes for it.

    Not in them are the app, which each node gets once, and what nodes that have nothing to do send and get all the
    time, since they ask for work every three seconds.
    """

    records: tuple[dict[str, Any], ...]
    up: float
    down: float


@pytest.fixture(scope="module")
def nodes(federation: Federation) -> Iterator[Counter]:
    """Server and nodes run, the nodes reach it through a proxy that counts; the strangers try all the while."""
    other = federation.lab.root / "other"
    federation.script("server.make_certificates", other, "--nodes", 1)
    with federation.server(), counting_proxy(federation.port) as counter, contextlib.ExitStack() as stack:
        for name in NODES:
            federation.script("server.nodes", "add", federation.keys / f"{name}.pub")
        for number, name in enumerate(NODES):
            stack.enter_context(federation.node(name, number, counter.port))
        stack.enter_context(federation.node("stranger", 2, federation.port, key=other / "node-0"))
        deceived = {"ca": other / "ca.crt", "key": federation.keys / "node-2"}
        stack.enter_context(federation.node("deceived", 2, federation.port, **deceived))
        processes.until(lambda: federation.joined(*NODES), 60, "nodes online", *map(federation.log, NODES))
        yield counter


@pytest.fixture(scope="module")
def seen(federation: Federation, nodes: Counter) -> Seen:
    """What was seen of a run in which all three train."""
    lab, out = federation.lab, federation.lab.root / "out"
    start = _now(nodes)
    time.sleep(IDLE_SECONDS)
    idle = _now(nodes)
    run_id = lab.start(NAME, out, *THREE)
    status = lab.finished(NAME, run_id, *map(federation.log, ("server", *NODES)))
    end = _now(nodes)
    assert status == "finished:completed", lab.flwr("log", run_id, NAME, "--show")
    lab.flwr("build", "--app", ".")
    (app,) = lab.app.glob("*.fab")
    up, down = (end[way] - idle[way] - (idle[way] - start[way]) * (end[0] - idle[0]) / IDLE_SECONDS for way in (1, 2))
    return Seen(tuple(journal.read(RunFolder(out).journal)), up, down - len(NODES) * app.stat().st_size)


def _now(counter: Counter) -> tuple[float, int, int]:
    return time.monotonic(), counter.up, counter.down


def test_three_nodes_of_three_ranks_train_together(seen: Seen) -> None:
    (record,) = [record for record in seen.records if record["event"] == "round"]
    assert [client["rank"] for client in record["clients"]] == [rank(number) for number in range(3)]
    assert not record["failures"]


def test_bytes_on_the_wire_are_those_of_the_journal(seen: Seen) -> None:
    end = seen.records[-1]
    for counted, crossed in ((end["bytes_up"], seen.up), (end["bytes_down"], seen.down)):
        assert 5e6 < 0.99 * counted < crossed < (1 + MOST_OVERHEAD) * counted


def test_a_node_whose_key_is_not_registered_is_refused_and_asks_again(federation: Federation, seen: Seen) -> None:
    said = federation.log("stranger").read_text()
    assert "the server does not take this key now: it is not registered there" in said
    assert said.count("fedpeft: node: started") > 1
    assert "SuperNode ID" not in said
    assert "ApiError:2004" in federation.log("server").read_text()


def test_a_node_that_trusts_another_authority_does_not_join(federation: Federation, seen: Seen) -> None:
    said = federation.log("deceived").read_text()
    assert "the server's certificate is not from the authority in server.root_certificates" in said
    assert "SuperNode ID" not in said


def test_a_key_is_registered_once_and_mistakes_are_told_in_one_sentence(federation: Federation, nodes: Counter) -> None:
    public = federation.keys / "node-1.pub"
    assert "expected a new key, found that node-1 is registered" in federation.refused("server.nodes", "add", public)
    assert "found a private key" in federation.refused("server.nodes", "add", public.with_suffix(""))
    assert "expected one of node-0, node-1, node-2" in federation.refused("server.nodes", "remove", "node-7")
    # Flower itself refuses a key that our notes have lost.
    notes = federation.home / "nodes.json"
    kept = notes.read_text()
    notes.write_text("[]\n")
    assert "Public key already in use" in federation.refused("server.nodes", "add", public)
    notes.write_text(kept)


@pytest.mark.faults
def test_after_a_crash_of_server_and_node_all_are_back_and_a_removed_node_is_not(
    federation: Federation, nodes: Counter
) -> None:
    log = federation.log
    os.kill(own_process(log("server"), "superlink"), signal.SIGKILL)
    os.kill(own_process(log("node-1"), "node"), signal.SIGKILL)
    for name, what in (("server", "superlink"), ("node-1", "node")):
        processes.until(partial(federation.said, name, f"{what}: ended with signal SIGKILL"), 20, "end", log(name))
    processes.until(lambda: processes.listening(federation.port), 60, "server", log("server"))
    federation.script("server.nodes", "remove", "node-2")
    for name, seconds in (("node-1", 60), ("node-2", 90)):
        processes.until(partial(federation.said, name, "does not take this key now"), seconds, "refusal", log(name))
    processes.until(lambda: log("node-1").read_text().count("SuperNode ID") > 1 or None, 120, "node", log("node-1"))
    processes.until(lambda: federation.joined("node-0", "node-1"), 60, "nodes online", log("node-0"), log("node-1"))
    assert federation.states().keys() == {"node-0", "node-1"}
