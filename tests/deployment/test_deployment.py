"""A server and three nodes as an operator starts them, on TLS with node keys; two strangers knock."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from fedpeft import journal
from fedpeft.config.node import NodeConfig, load_node
from fedpeft.runs import RunFolder
from tests.deployment.federation import NAME, Federation, line, own_process
from tests.deployment.proxy import Counter, counting_proxy
from tests.engines import processes

pytestmark = [pytest.mark.engines, pytest.mark.assets]

PROFILES = {"node-0": "edge-cpu", "node-1": "laptop", "node-2": "big-gpu"}
"""The profile of each node; their files say that the device is a CPU, which wins."""

NODES = tuple(PROFILES)
SUPERNODE = (*line("clients.start"), "--supernode")
THREE = (
    "rounds=2",
    "federation.clients=3",
    "federation.cohort=3",
    "federation.ranks=declared",
    "adapter.lora.rank=64",
    "adapter.lora.target_modules=query,key,value,dense",
    "adapter.lora.layers=0,1,2,3,4,5",
    "aggregation.codec.kind=dense",
    "aggregation.downlink.kind=dense",
    "aggregation.first=sent",
)
"""Ranks of their own, and all in float32: so much is sent that what crosses besides is little."""
MOST_OVERHEAD = 0.03
"""Of the payload that the journal counts, what may cross besides."""


@dataclass(frozen=True)
class Seen:
    """A run's journal, and the bytes that crossed to (down) and from (up) the nodes while it was under way."""

    records: tuple[dict[str, Any], ...]
    up: int
    down: int


@pytest.fixture(scope="module")
def nodes(federation: Federation) -> Iterator[Counter]:
    """Server and nodes run, and the nodes reach it through a proxy that counts."""
    with federation.server(), counting_proxy(federation.port) as counter, contextlib.ExitStack() as stack:
        for number, name in enumerate(NODES):
            federation.script("server.nodes", "add", federation.keys / f"{name}.pub")
            stack.enter_context(federation.node(name, number, f"127.0.0.1:{counter.port}", profile=PROFILES[name]))
        federation.wait_for(*NODES)
        yield counter


@pytest.fixture(scope="module")
def strangers(federation: Federation, seen: Seen) -> None:
    """Two nodes of Flower's own kind have tried to join, and tried again.

    The stranger has a key that nobody knows, the deceived one the certificate of another authority.
    """
    other, address = federation.lab.root / "other", f"127.0.0.1:{federation.port}"
    federation.script("server.make_certificates", other, "--nodes", 1)
    deceived = {"ca": other / "ca.crt", "key": federation.keys / "node-2"}
    with (
        federation.node("stranger", 2, address, command=SUPERNODE, key=other / "node-0"),
        federation.node("deceived", 2, address, command=SUPERNODE, **deceived),
    ):
        for log in map(federation.log, ("stranger", "deceived")):
            processes.until(partial(tried_again, log), 120, "second try", log)


def tried_again(log: Path) -> bool | None:
    return True if log.read_text().count("node: started") > 1 else None


@pytest.fixture(scope="module")
def seen(federation: Federation, nodes: Counter) -> Seen:
    """What was seen of a run in which all three train."""
    lab, out = federation.lab, federation.lab.root / "out"
    up, down = nodes.up, nodes.down
    run_id = lab.start(NAME, out, *THREE)
    logs = [federation.log(name) for name in ("server", *NODES)]
    processes.until(lambda: (out / "report.html").exists() or None, 300, "report of the run", *logs)
    status = lab.finished(NAME, run_id, *logs)
    assert status == "finished:completed", lab.flwr("log", run_id, NAME, "--show")
    return Seen(tuple(journal.read(RunFolder(out).journal)), nodes.up - up, nodes.down - down)


def settings(federation: Federation, name: str) -> NodeConfig:
    """The settings of a node, by its file and its profile."""
    return load_node(federation.lab.root / f"{name}.toml")


def test_three_nodes_of_three_profiles_and_ranks_train_together(federation: Federation, seen: Seen) -> None:
    records = [record for record in seen.records if record["event"] == "round"]
    profiles = [settings(federation, name) for name in NODES]
    assert len({profile.limits for profile in profiles}) == 3
    assert [profile.rank for profile in profiles] == [4, 8, 64]
    for record in records:
        assert [client["rank"] for client in record["clients"]] == [profile.rank for profile in profiles]
        assert not record["failures"]


def test_bytes_on_the_wire_are_those_of_the_journal(seen: Seen) -> None:
    end = seen.records[-1]
    for counted, crossed in ((end["bytes_up"], seen.up), (end["bytes_down"], seen.down)):
        assert 20e6 < counted < crossed < (1 + MOST_OVERHEAD) * counted


def test_a_node_whose_key_is_not_registered_is_refused_and_asks_again(federation: Federation, strangers: None) -> None:
    said = federation.log("stranger").read_text()
    assert "the server does not take this key now: it is not registered there" in said
    assert "SuperNode ID" not in said
    assert "ApiError:2004" in federation.log("server").read_text()


def test_a_node_that_trusts_another_authority_does_not_join(federation: Federation, strangers: None) -> None:
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
    processes.until(partial(federation.said, "node-2", "does not take this key now"), 90, "refusal", log("node-2"))
    federation.wait_for("node-1", times=2)
    assert federation.states() == {"node-0": "online", "node-1": "online"}
