"""A sweep runs cells side by side, keeps what is finished, goes on after a kill, and tells what failed."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from fedpeft import journal
from fedpeft.commands.check import run_check
from fedpeft.config import to_toml
from fedpeft.errors import ConfigError, FederationError
from fedpeft.sweeps.running import run_sweep
from tests import tiny

SWEEP = """
[sweep]
workers = 2
seeds = [1, 2]
[sweep.axes.rate]
slow = []
fast = ["training.learning_rate=0.05"]
"""
LONGEST_SECONDS = 120


@pytest.fixture
def plan(tiny_model: Path, tiny_rows: Path, tmp_path: Path) -> Callable[..., Path]:
    def made(text: str = SWEEP, **changes: Any) -> Path:
        config = tiny.run_config(tiny_model, tiny_rows, tmp_path / "out", compute={"threads": 1}, **changes)
        path = tmp_path / "sweep.toml"
        path.write_text(to_toml(config) + text)
        return path

    return made


def results(root: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (root / "results.jsonl").read_text().splitlines()]


def test_cells_run_side_by_side_and_what_is_finished_is_kept(plan: Callable[..., Path], tmp_path: Path) -> None:
    told: list[str] = []
    root, text = run_sweep(plan(), [], told.append)
    rows = results(root)
    assert [(row["variants"]["rate"], row["seed"]) for row in rows] == [
        ("slow", 1),
        ("fast", 1),
        ("slow", 2),
        ("fast", 2),
    ]
    assert sum(line.startswith("finished") for line in told) == 4
    assert "| slow | 2 |" in text
    assert (root / "table.md").read_text() == text
    losses = [row["figures"]["loss"] for row in rows]
    assert len(set(losses)) == 4

    told.clear()
    run_sweep(plan(SWEEP.replace("0.05", "0.02")), [], told.append)
    assert sorted(line.split()[0] for line in told) == ["finished", "finished", "kept", "kept"]
    assert all("slow" in line for line in told if line.startswith("kept"))
    again = {row["folder"]: row["figures"] for row in results(root)}
    assert all(again[row["folder"]] == row["figures"] for row in rows if row["variants"]["rate"] == "slow")


def test_a_cell_that_was_cut_off_is_resumed(plan: Callable[..., Path]) -> None:
    path = plan("[sweep]\n", rounds=20)
    command = [sys.executable, "-m", "fedpeft", "simulate", str(path), "--quiet"]
    root = path.parent / "out"
    process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + LONGEST_SECONDS
        while not any(lines(path) > 5 for path in root.glob("cells/*/journal.jsonl")):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    (begun,) = (path for path in root.glob("cells/*/journal.jsonl") if lines(path) > 5)
    before = journal.read(begun)
    assert before[-1]["event"] == "round"
    run_sweep(path, [], lambda _: None)
    after = journal.read(begun)
    assert after[:4] == before[:4]
    assert any(record["event"] == "resume" and record["round"] >= 3 for record in after)
    assert [record["round"] for record in after if record["event"] == "round"] == list(range(1, 21))


def test_no_worker_outlives_a_sweep_that_is_killed(plan: Callable[..., Path]) -> None:
    path = plan(SWEEP, rounds=100_000)
    command = [sys.executable, "-m", "fedpeft", "simulate", str(path), "--quiet"]
    root = path.parent / "out"
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    family: list[psutil.Process] = []
    try:
        deadline = time.monotonic() + LONGEST_SECONDS
        while not any(lines(path) > 2 for path in root.glob("cells/*/journal.jsonl")):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        family = psutil.Process(process.pid).children(recursive=True)
        assert len(family) >= 2
        process.kill()
        assert psutil.wait_procs(family, timeout=30)[1] == []
    finally:
        process.kill()
        process.wait()
        for one in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_a_cell_that_fails_is_told_and_stops_no_other(plan: Callable[..., Path], tmp_path: Path) -> None:
    sets = 'rows = ["data.origin.jsonl.path=nowhere.jsonl"]\n'
    text = SWEEP.replace("[1, 2]", "[1]") + sets
    with pytest.raises(FederationError, match=r"1 that failed, the first runs rows seed 1: .*nowhere.jsonl"):
        run_sweep(plan(text), [], lambda _: None)
    assert [row["variants"]["rate"] for row in results(tmp_path / "out")] == ["slow", "fast"]


def test_a_check_tells_of_every_combination_whether_it_can_run(
    plan: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_check(plan(), [])
    assert capsys.readouterr().out.splitlines()[:2] == ["can run  runs slow", "can run  runs fast"]
    bad = ['private = ["privacy.mechanism=central", "aggregation.merge.fedavg.weights=examples"]']
    with pytest.raises(ConfigError, match=r"sweep\.toml: expected 3 combinations that can run, found 1 that cannot"):
        run_check(plan(SWEEP + "\n".join(bad)), [])
    told = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0][:20] for line in told[:3]] == [
        "can run  runs slow",
        "can run  runs fast",
        "refused  runs privat",
    ]
    assert "3 combinations, 6 runs below" in told[-1]
    assert not (tmp_path / "out").exists()


def test_a_check_of_a_sweep_reads_what_it_will_measure_with(plan: Callable[..., Path]) -> None:
    text = SWEEP + '[[sweep.grids]]\naxes = ["rate"]\nmeasure = "nowhere.at_all:figure"\n'
    with pytest.raises(ConfigError, match="nowhere"):
        run_check(plan(text), [])


def test_a_measurement_that_is_nowhere_is_refused_before_anything_runs(
    plan: Callable[..., Path], tmp_path: Path
) -> None:
    text = SWEEP + '[[sweep.grids]]\naxes = ["rate"]\nmeasure = "nowhere.at_all:figure"\n'
    with pytest.raises(ConfigError, match="nowhere"):
        run_sweep(plan(text), [], lambda _: None)
    assert not (tmp_path / "out").exists()
