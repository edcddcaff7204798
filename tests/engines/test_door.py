"""Nodes that are not like the server, or not like themselves, at the door of a real federation."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fedpeft import journal
from fedpeft.assets import resolve
from fedpeft.runs import RunFolder
from tests.deployment.federation import NAME, Federation, line
from tests.engines import processes
from tests.engines.conftest import adapter
from tests.engines.lab import lab_in

pytestmark = [pytest.mark.engines, pytest.mark.assets]
TWO = ("federation.clients=2", "federation.cohort=2")
NODES = ("node-0", "node-1", "node-2", "node-3")
SECONDS = 120.0

PEFT = "libraries of the node: expected peft 0.21, found peft 0.20.0; run there: pip install 'peft==0.21."
BASE = "base model of the node: expected that of "
TAKEN = "partition 0: expected one node that has it, found another that is connected and has it already; set a number"


@pytest.fixture
def federation(short_folder: Path) -> Federation:
    (port,) = processes.free_ports(1)
    found = Federation(lab_in(short_folder), port)
    found.script("server.make_certificates", found.keys, "--nodes", len(NODES))
    return found


@contextlib.contextmanager
def node(
    found: Federation, name: str, partition: int, more: str = "", path: str = ""
) -> Iterator[subprocess.Popen[bytes]]:
    file = found.lab.root / f"{name}.toml"
    (port,) = processes.free_ports(1)
    file.write_text(
        f'partition = {partition}\nport = {port}\n{more}\n[server]\naddress = "127.0.0.1:{found.port}"\n'
        f'root_certificates = "{found.keys / "ca.crt"}"\nprivate_key = "{found.keys / name}"\n'
    )
    env = {**found.lab.env, "FLWR_HOME": str(found.lab.root / f"flwr-{name}"), "PYTHONPATH": path}
    with processes.started(line("clients.start", file), env, found.lab.app, found.log(name)) as process:
        yield process


def older_peft(folder: Path) -> str:
    """A folder that makes a process believe that it has an older peft."""
    (folder / "peft-0.20.0.dist-info").mkdir(parents=True)
    (folder / "peft-0.20.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: peft\nVersion: 0.20.0\n")
    return str(folder)


def test_who_does_not_fit_is_told_at_the_door_and_a_node_that_is_mended_takes_part(
    federation: Federation, in_process: Callable[..., bytes], tiny_model: Path
) -> None:
    lab, out = federation.lab, federation.lab.root / "out"
    ours, another = (f'[model]\nfolder = "{folder}"' for folder in (resolve("minilm"), tiny_model))
    asked = (*TWO, f"model.source={resolve('minilm')}")
    expected = in_process(*asked)
    older = older_peft(lab.root / "older")
    logs = [federation.log(name) for name in ("server", *NODES)]

    def told(text: str, *names: str) -> None:
        said = f"the server does not let this node take part: {text}"
        processes.until(lambda: any(federation.said(name, said) for name in names) or None, SECONDS, text, *logs)

    with contextlib.ExitStack() as stack:
        stack.enter_context(federation.server())
        for name in NODES:
            federation.script("server.nodes", "add", federation.keys / f"{name}.pub")
        stack.enter_context(node(federation, "node-0", 0, ours))
        stack.enter_context(node(federation, "node-3", 0, ours))
        with node(federation, "node-1", 1, ours, path=older), node(federation, "node-2", 1, another):
            federation.wait_for(*NODES)
            run_id = lab.start(NAME, out, *asked)
            told(PEFT, "node-1")
            told(BASE, "node-2")
            told(TAKEN, "node-0", "node-3")
        stack.enter_context(node(federation, "node-1", 1, ours))
        assert lab.finished(NAME, run_id, *logs) == "finished:completed"
        assert "well" in federation.script("clients.health", lab.root / "node-0.toml")
        shown = lab.flwr("log", run_id, NAME, "--show")
    assert [f"{how}: {text}" in shown for how, text in (("left out", PEFT), ("left out", BASE), ("waits", TAKEN))] == [
        True
    ] * 3
    assert adapter(out) == expected
    rounds = [record for record in journal.read(RunFolder(out).journal) if record["event"] == "round"]
    phases = [record["seconds"]["nodes"] for record in rounds]
    assert [sorted(of_round) for of_round in phases] == [["0", "1"], ["0", "1"]]
    # What the answer to the first request took to send is known when the second is answered.
    assert all(one.keys() == {"receive", "train", "send"} for one in phases[-1].values())
    assert all(seconds >= 0 for of_round in phases for one in of_round.values() for seconds in one.values())
