from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from flwr.supercore.task_identity import TaskIdentity

from fedpeft.config import RunConfig, load
from fedpeft.engines.local import LocalTransport
from fedpeft.experiment import resolve, site_of
from fedpeft.federate import federate
from fedpeft.memory import FolderMemory
from fedpeft.runs import RunFolder

ROOT = Path(__file__).parent.parent.parent
SHRUNK = (
    "rounds=2",
    "training.steps=2",
    "data.partition.most_rows=40",
    "data.most_test_rows=20",
    "compute.threads=1",
    "evaluation.every=0",
)
"""The demo, small enough for an engine test."""


@pytest.fixture
def demo(tmp_path: Path, one_thread: None) -> Callable[..., tuple[RunConfig, RunFolder]]:
    """Resolved settings of the shrunk demo with `overrides`, and a run folder of the name given."""

    def build(name: str, *overrides: str) -> tuple[RunConfig, RunFolder]:
        folder = RunFolder(tmp_path / name)
        config = resolve(load(ROOT / "simulations" / "demo.toml", [*SHRUNK, *overrides]))
        return replace(config, out=str(folder.root)), folder

    return build


@pytest.fixture
def in_process(demo: Callable[..., tuple[RunConfig, RunFolder]]) -> Callable[..., bytes]:
    """The bytes of the adapter that the in-process engine ends with."""

    def run(*overrides: str) -> bytes:
        config, folder = demo("in-process", *overrides)
        clients = config.federation.clients
        transport = LocalTransport(clients, lambda partition: site_of(config, partition), FolderMemory(folder.memories))
        federate(config, folder, transport, engine="local")
        return adapter(folder.root)

    return run


def adapter(run: Path) -> bytes:
    return (run / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """A new folder with a short path: sockets live in some of its folders, and their paths are bounded."""
    folder = Path(tempfile.mkdtemp(prefix="fp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def in_a_flower_run() -> int:
    """The number of a Flower run that this process takes part in, so that it can make messages."""
    TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 7, 1, 1
    return 7
