"""How many times faster than Flower's Ray engine with a model for each message, on the same federation.

    python -m simulations.benchmarks.against_flower simulations/demo.toml --rounds 3

Each side is a process of its own, from its first import to its end; the two take turns. Ours writes its journal,
checkpoints, report and adapter, and scores the adapter at the end, which the other does not. Warm are rounds after the
first, by each side's own clock.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import typer

from fedpeft import journal
from fedpeft.cli import script
from fedpeft.config import RunConfig, load, override, to_toml

MOST_SECONDS = 900.0
"""A process that takes longer is taken to hang."""

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


def task(first: RunConfig, rounds: int, overrides: Sequence[str] = ()) -> RunConfig:
    """The run with so many rounds and next to nothing to score."""
    return override(first, [f"rounds={rounds}", "evaluation.every=0", "data.most_test_rows=10", *overrides])


def ours(config: RunConfig, folder: Path) -> Took:
    """`fedpeft simulate` with a worker for each of two cores."""
    path, out = _written(config, folder), folder / "run"
    told = ["compute.workers=2", "compute.threads=2", f"out={out}"]
    asked = [item for each in told for item in ("--set", each)]
    command = ["-m", "fedpeft", "simulate", str(path), "--quiet", "--no-bounds", *asked]
    whole, _ = _process(command, folder)
    ends = [one["seconds"]["total"] for one in journal.read(out / "journal.jsonl") if one["event"] == "round"]
    return Took(whole, statistics.median(ends[1:]))


def flowers(config: RunConfig, folder: Path) -> Took:
    """The same by `simulations.benchmarks.usual_flower`."""
    whole, said = _process(["-m", "simulations.benchmarks.usual_flower", str(_written(config, folder))], folder)
    over = json.loads(said.splitlines()[-1])["rounds"]
    return Took(whole, statistics.median(late - early for early, late in itertools.pairwise(over[1:])))


def measure(config: RunConfig, repeats: int) -> list[tuple[Took, Took]]:
    """Ours and Flower's, for each repeat; who goes first alternates."""
    found = []
    for repeat in range(repeats):
        took: dict[str, Took] = {}
        sides = [("ours", ours), ("flower", flowers)]
        for name, side in sides if repeat % 2 else sides[::-1]:
            with tempfile.TemporaryDirectory() as root:
                took[name] = side(config, Path(root))
        found.append((took["ours"], took["flower"]))
    return found


def over_flower(found: Sequence[tuple[Took, Took]]) -> Mapping[str, list[float]]:
    """How many times Flower's seconds are ours, whole and warm, in each repeat."""
    return {
        "whole": [other.whole / own.whole for own, other in found],
        "warm": [other.warm / own.warm for own, other in found],
    }


def rows(name: str, found: Sequence[tuple[Took, Took]]) -> list[str]:
    """A line for each side: medians over the repeats."""
    sides = (("fedpeft", [own for own, _ in found]), ("Flower, Ray, a model a message", [other for _, other in found]))
    return [
        f"| {name} | {side} | {statistics.median(one.whole for one in took):.1f} "
        f"| {statistics.median(one.warm for one in took):.2f} |"
        for side, took in sides
    ]


def _written(config: RunConfig, folder: Path) -> Path:
    path = folder / "settings.toml"
    path.write_text(to_toml(config), encoding="utf-8")
    return path


def _process(command: Sequence[str], home: Path) -> tuple[float, str]:
    """The seconds of a process of this Python, and what it printed.

    Raises:
        BadParameter: it failed, or took too long.
    """
    environment = {**os.environ, **_QUIET, "FLWR_HOME": str(home / "flwr")}
    started = time.perf_counter()
    try:
        done = subprocess.run(
            [sys.executable, *command],
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


def main(
    path: Annotated[Path, typer.Argument(help="The federation.")] = Path("simulations/demo.toml"),
    rounds: Annotated[int, typer.Option(min=3)] = 3,
    repeats: Annotated[int, typer.Option(min=1)] = 1,
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE")] = None,
) -> None:
    """Print seconds of both sides."""
    config = task(load(path, set_ or []), rounds)
    typer.echo(HEADING)
    for line in rows(config.name, measure(config, repeats)):
        typer.echo(line)


if __name__ == "__main__":
    script(main)
