"""The same federation by us and by another framework, each side a process of its own, in turns.

Each process counts from its first import to its end. Ours writes its journal, checkpoints, report and adapter, and
scores the adapter at the end. Warm are rounds after the first, by each side's own clock.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import typer

from fedpeft import journal
from fedpeft.config import RunConfig, override, to_toml

MOST_SECONDS = 900.0
"""A process that takes longer is taken to hang."""

OURS = "fedpeft"
"""What our side is called."""

FLOAT32 = ("aggregation.codec.kind=dense", "aggregation.downlink.kind=dense", "aggregation.first=sent")
"""Settings under which all that we send is float32, as others send it."""

HEADING = "| task | side | whole process, s | a round after the first, s |\n|---|---|---:|---:|"

_QUIET = {
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_TELEMETRY_ENABLED": "0",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}


class Took(NamedTuple):
    """Seconds of a whole process, and of a round after the first, the median."""

    whole: float
    warm: float


Side = Callable[[RunConfig, Path], Took]
"""Runs the settings, with an empty folder to write to."""

Found = Sequence[Mapping[str, Took]]
"""What each side took, for each repeat."""


def task(first: RunConfig, rounds: int, overrides: Sequence[str] = ()) -> RunConfig:
    """The run in float32 with so many rounds and next to nothing to score."""
    told = [f"rounds={rounds}", "evaluation.every=0", "data.most_test_rows=10", *FLOAT32]
    return override(first, [*told, *overrides])


def ours(config: RunConfig, folder: Path) -> Took:
    """`fedpeft simulate` with a worker for each of two cores, clients together where that is faster."""
    path, out = written(config, folder), folder / "run"
    told = ["compute.workers=2", "compute.threads=2", "compute.cohort=auto", f"out={out}"]
    asked = [item for each in told for item in ("--set", each)]
    command = ["-m", "fedpeft", "simulate", str(path), "--quiet", "--no-bounds", *asked]
    whole, _ = process(command, folder)
    ends = [one["seconds"]["total"] for one in journal.read(out / "journal.jsonl") if one["event"] == "round"]
    return Took(whole, statistics.median(ends[1:]))


def measure(config: RunConfig, repeats: int, sides: Mapping[str, Side]) -> Found:
    """What each side takes, for each repeat; who goes first turns with the repeats."""
    found, names = [], list(sides)
    for repeat in range(repeats):
        took: dict[str, Took] = {}
        first = repeat % len(names)
        for name in [*names[first:], *names[:first]]:
            with tempfile.TemporaryDirectory() as root:
                took[name] = sides[name](config, Path(root))
        found.append({name: took[name] for name in names})
    return found


def over(found: Found) -> Mapping[str, list[float]]:
    """How many times ours the seconds of the fastest other side are, whole and warm, in each repeat."""
    others = [[one for name, one in took.items() if name != OURS] for took in found]
    pairs = list(zip(found, others, strict=True))
    return {
        "whole": [min(one.whole for one in rest) / took[OURS].whole for took, rest in pairs],
        "warm": [min(one.warm for one in rest) / took[OURS].warm for took, rest in pairs],
    }


def rows(name: str, found: Found) -> list[str]:
    """A line for each side: medians over the repeats."""
    return [
        f"| {name} | {side} | {statistics.median(took[side].whole for took in found):.1f} "
        f"| {statistics.median(took[side].warm for took in found):.2f} |"
        for side in found[0]
    ]


def written(config: RunConfig, folder: Path) -> Path:
    """The settings as a file in `folder`."""
    path = folder / "settings.toml"
    path.write_text(to_toml(config), encoding="utf-8")
    return path


def process(
    command: Sequence[str], home: Path, python: str = sys.executable, told: Mapping[str, str] | None = None
) -> tuple[float, str]:
    """The seconds of a process of `python`, with `told` in its environment, and what it printed.

    Raises:
        BadParameter: it failed, or took too long.
    """
    environment = {**os.environ, **_QUIET, "FLWR_HOME": str(home / "flwr"), **(told or {})}
    started = time.perf_counter()
    try:
        done = subprocess.run(
            [python, *command],
            env=environment,
            capture_output=True,
            text=True,
            timeout=MOST_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise typer.BadParameter(f"{command[1]} took longer than {MOST_SECONDS:g} s") from error
    if done.returncode:
        raise typer.BadParameter(f"{command[1]} failed: {done.stderr.strip()[-500:]}")
    return time.perf_counter() - started, done.stdout
