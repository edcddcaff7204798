"""A run killed with SIGKILL at any moment, and gone on with, ends with the bytes of a run never killed."""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.faults

ROUNDS = 40
KILLS = 3
LONGEST_SECONDS = 120


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "fedpeft", "simulate", "--no-bounds", "--quiet", *arguments]
    return subprocess.Popen(command, cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finish(process: subprocess.Popen[str]) -> None:
    _, complaints = process.communicate(timeout=LONGEST_SECONDS)
    assert process.returncode == 0, complaints


def rounds_done(run: Path) -> int:
    """How many rounds the journal holds, torn lines aside."""
    try:
        lines = (run / "journal.jsonl").read_bytes().split(b"\n")[:-1]
    except FileNotFoundError:
        return 0
    return sum(json.loads(line)["event"] == "round" for line in lines)


def kill_in_the_middle(process: subprocess.Popen[str], run: Path, round_: int, delay_seconds: float) -> None:
    """SIGKILL some moment after round `round_` is in the journal."""
    deadline = time.monotonic() + LONGEST_SECONDS
    while rounds_done(run) < round_ and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    time.sleep(delay_seconds)
    assert process.poll() is None, "the run ended before it could be killed: give it more rounds"
    process.kill()
    process.communicate(timeout=LONGEST_SECONDS)


def bytes_of(run: Path) -> str:
    return hashlib.sha256((run / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()


def test_a_run_killed_at_random_moments_ends_with_the_same_bytes(tiny_run: str, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(tiny_run, encoding="utf-8")
    settings = ["run.toml", "--set", f"rounds={ROUNDS}", "--set", "aggregation.stages.local=classifier*"]
    finish(start(tmp_path, *settings, "--set", "out=whole"))

    seed = int(os.environ.get("FEDPEFT_KILL_SEED", random.SystemRandom().randrange(10**6)))
    moments = random.Random(seed)
    run = tmp_path / "killed"
    for kill in range(KILLS):
        arguments = ["--resume", str(run)] if kill else [*settings, "--set", f"out={run}"]
        round_ = rounds_done(run) + moments.randint(1, ROUNDS // (2 * KILLS))
        kill_in_the_middle(start(tmp_path, *arguments), run, round_, moments.uniform(0, 0.1))
    assert 0 < rounds_done(run) < ROUNDS
    finish(start(tmp_path, "--resume", str(run)))

    print(f"killed {KILLS} times with FEDPEFT_KILL_SEED={seed}")
    assert bytes_of(run) == bytes_of(tmp_path / "whole")
    records = [json.loads(line) for line in (run / "journal.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [record["round"] for record in records if record["event"] == "round"] == list(range(1, ROUNDS + 1))
    assert sum(record["event"] == "resume" for record in records) == KILLS
