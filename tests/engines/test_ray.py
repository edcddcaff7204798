"""Ray in a process of its own, through the command line: Ray leaves children that this one would be blamed for."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from fedpeft import journal
from fedpeft.runs import RunFolder
from tests.engines import processes
from tests.engines.conftest import ROOT, SHRUNK, adapter
from tests.engines.private import CENTRAL, EXAMPLE, LOCAL, PRODUCTS

pytestmark = [pytest.mark.engines, pytest.mark.assets]
THREE = ("federation.clients=3", "federation.cohort=2")


def fedpeft(*arguments: object, seconds: float = 180.0) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        processes.command("fedpeft", *arguments),
        env={**os.environ, "COLUMNS": "200"},
        cwd=ROOT,
        timeout=seconds,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )


def simulate(out: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    sets = [part for each in (*SHRUNK, *overrides, f"out={out}") for part in ("--set", each)]
    return fedpeft("simulate", "simulations/demo.toml", "--engine", "ray", "--no-bounds", "--quiet", *sets)


def test_ray_gives_the_bytes_of_the_in_process_engine_and_so_does_resuming(
    tmp_path: Path, in_process: Callable[..., bytes]
) -> None:
    expected = in_process(*THREE)
    folder = RunFolder(tmp_path / "ray")
    done = simulate(folder.root, *THREE)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    assert [record["failures"] for record in journal.read(folder.journal) if record["event"] == "round"] == [[], []]
    assert adapter(folder.root) == expected

    newest = max(folder.checkpoint.iterdir())
    for path in folder.checkpoint.glob(f"{newest.stem}*"):
        path.unlink()
    (folder.adapter / "adapter_model.safetensors").unlink()
    done = fedpeft("simulate", "--resume", folder.root, "--engine", "ray", "--no-bounds", "--quiet")
    assert done.returncode == 0, done.stderr
    assert any(record["event"] == "resume" and record["round"] == 1 for record in journal.read(folder.journal))
    assert adapter(folder.root) == expected


@pytest.mark.parametrize("private", [CENTRAL, (*PRODUCTS, *EXAMPLE)], ids=["central", "sums of example-level products"])
def test_a_private_run_on_ray_gives_the_bytes_of_the_in_process_engine(
    tmp_path: Path, in_process: Callable[..., bytes], private: tuple[str, ...]
) -> None:
    asked = ("federation.clients=3", "federation.cohort=3", *private)
    expected = in_process(*asked)
    folder = RunFolder(tmp_path / "ray")
    done = simulate(folder.root, *asked)
    assert done.returncode == 0, done.stderr
    rounds = [record for record in journal.read(folder.journal) if record["event"] == "round"]
    assert [record["failures"] for record in rounds] == [[], []]
    assert 0 < rounds[0]["epsilon"] < rounds[1]["epsilon"]
    assert adapter(folder.root) == expected


def test_clients_on_ray_add_noise_of_their_own(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "ray")
    done = simulate(folder.root, *THREE, *LOCAL, "rounds=1")
    assert done.returncode == 0, done.stderr
    records = journal.read(folder.journal)
    noise = 0.02 * records[0]["adapter"]["trainable_parameters"] ** 0.5
    sizes = [client["update_norm"] for one in records if one["event"] == "round" for client in one["clients"]]
    assert len(sizes) == 2
    assert all(0.9 * noise < size < 1.1 * noise for size in sizes)


@pytest.mark.parametrize(
    ("overrides", "code", "expected"),
    [
        (("compute.cpus_per_client=4096",), 2, "found 4096 and 0; ask for less"),
        (("compute.ray_address=127.0.0.1:9",), 1, "Ray at 127.0.0.1:9: expected a cluster that can be used"),
        (("training.learning_rate=1e30", *THREE), 1, "expected a finite loss"),
    ],
)
def test_a_mistake_or_a_failed_run_ends_in_one_sentence(
    tmp_path: Path, overrides: tuple[str, ...], code: int, expected: str
) -> None:
    done = simulate(tmp_path / "ray", *overrides)
    assert done.returncode == code
    assert expected in done.stderr
    assert done.stderr.count("\n") == 1
