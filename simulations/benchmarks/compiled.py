"""What `training.compiled` is worth: a client's steps with it and without, by size of batch.

    python -m simulations.benchmarks.compiled simulations/demo.toml --set compute.threads=1

In each repeat both train one client from the same adapter on the same batches; who goes first alternates. The figures
are medians of paired ratios, and the seconds of the first training of each size, in which torch compiles.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import typer

from fedpeft.cli import script
from fedpeft.client import FitJob
from fedpeft.config import RunConfig, load
from fedpeft.experiment import site_of
from fedpeft.training import use_threads
from simulations.benchmarks.cohort import SHAPES
from simulations.benchmarks.workers import shaped

HEADING = (
    "| rows × tokens | as they are, s | compiled, s | times faster | the first time, s |\n|---|---:|---:|---:|---:|"
)


class Found(NamedTuple):
    """Seconds of a client's steps as they are and compiled, for each repeat, and of the first compiled ones."""

    plain: Sequence[float]
    compiled: Sequence[float]
    first: float


def measure(config: RunConfig, backend: str, repeats: int) -> Found:
    """One client's steps, both ways in turns, after one of each for warming up."""
    settings = replace(config, training=replace(config.training, compiled=backend))
    plain, compiled = (_training(one) for one in (config, settings))
    plain()
    first = _seconds(compiled)
    took: dict[Callable[[], object], list[float]] = {plain: [], compiled: []}
    for repeat in range(repeats):
        for way in (plain, compiled) if repeat % 2 else (compiled, plain):
            took[way].append(_seconds(way))
    return Found(took[plain], took[compiled], first)


def _training(config: RunConfig) -> Callable[[], object]:
    learner = site_of(config, 0).learner
    return lambda: learner.fit(learner.start, FitJob(1, 0, (), 0))


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def main(
    path: Annotated[Path, typer.Argument(help="Whose client is trained.")] = Path("simulations/demo.toml"),
    backend: Annotated[str, typer.Option(help="Of torch.compile's.")] = "inductor",
    repeats: Annotated[int, typer.Option(min=1)] = 7,
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE")] = None,
) -> None:
    """Print a table: a client's seconds both ways, and how many times faster compiled steps are."""
    first = load(path, set_ or [])
    use_threads(first.compute.threads)
    typer.echo(f"{torch.get_num_threads()} threads, {first.training.steps} steps\n")
    typer.echo(
        "| rows × tokens | as they are, s | compiled, s | times faster | the first time, s |\n|---|---:|---:|---:|---:|"
    )
    for rows, tokens in SHAPES:
        found = measure(shaped(first, rows, tokens), backend, repeats)
        seconds = [f"{statistics.median(each):.3f}" for each in (found.plain, found.compiled)]
        times = statistics.median(one / other for one, other in zip(found.plain, found.compiled, strict=True))
        typer.echo(f"| {rows} × {tokens} | {' | '.join(seconds)} | {times:.2f} | {found.first:.1f} |")


if __name__ == "__main__":
    script(main)
