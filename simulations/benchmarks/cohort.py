"""How many clients' steps a second a cohort takes: together, one by one, and in a bare PyTorch loop.

    python -m simulations.benchmarks.cohort simulations/demo.toml --clients 12 --repeats 5

In each repeat all three train the same clients from the same adapter on the same batches, in an order that turns with
the repeats. `together` is `fedpeft.cohort.fit_cohort`, `one by one` is `fedpeft.training.fit`, and `bare` a loop that
knows nothing of federations. The figures are medians of the paired ratios of their times.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer

from fedpeft.cli import script
from fedpeft.client import FitJob
from fedpeft.cohort import Member, fit_cohort
from fedpeft.cohort_choice import ALONE, right_way
from fedpeft.cohort_layers import WAYS
from fedpeft.config import RunConfig, load, override
from fedpeft.experiment import adapted_model, learner_of, resolve, site_examples
from fedpeft.training import use_threads
from simulations.benchmarks.overhead import bare_round

SHAPES = ((1, 16), (4, 16), (4, 64), (16, 64))
"""Rows of a batch, and tokens that a row is cut at: the first two are those of edge devices."""


def members_of(config: RunConfig, clients: int) -> list[Member]:
    """The first clients of a run, as they begin it."""
    adapted = adapted_model(config)
    return [
        Member(learner_of(config, site_examples(config, p)), adapted.initial, FitJob(1, p, (), 0))
        for p in range(clients)
    ]


def measure(config: RunConfig, clients: int, repeats: int) -> list[tuple[float, float, float]]:
    """Seconds of (together, one by one, bare) for each repeat, after one of each for warming up."""
    members, tokens = members_of(config, clients), config.compute.cohort_tokens
    name = right_way(members, tokens)
    if name == ALONE:
        raise typer.BadParameter("the clients of these settings cannot train together")
    jobs: Sequence[Callable[[], object]] = (
        partial(fit_cohort, members, tokens, WAYS[name]),
        lambda: [one.learner.fit(one.adapter, one.job) for one in members],
        partial(bare_round, config, members[0].learner.adapted, range(clients)),
    )
    for job in jobs:
        job()
    found = []
    for repeat in range(repeats):
        order = [(repeat + at) % len(jobs) for at in range(len(jobs))]
        seconds = {at: _timed(jobs[at]) for at in order}
        found.append((seconds[0], seconds[1], seconds[2]))
    return found


def row(config: RunConfig, clients: int, found: Sequence[tuple[float, float, float]]) -> str:
    """One line of the table: what was trained, clients' steps a second, and the two ratios."""
    steps = clients * config.training.steps
    rates = [statistics.median(steps / seconds[at] for seconds in found) for at in range(3)]
    over_one_by_one, over_bare = (statistics.median(each[at] / each[0] for each in found) for at in (1, 2))
    shape = f"{config.training.batch_size} × {getattr(config.task.chosen, 'max_tokens', 0)}"
    return (
        f"| {shape} | {clients} | {rates[0]:.1f} | {rates[1]:.1f} | {rates[2]:.1f} "
        f"| {over_one_by_one:.2f} | {over_bare:.2f} |"
    )


def _timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def main(
    path: Annotated[Path, typer.Argument(help="The settings whose clients are trained.")] = Path(
        "simulations/demo.toml"
    ),
    clients: Annotated[int, typer.Option(min=2)] = 12,
    repeats: Annotated[int, typer.Option(min=1)] = 5,
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE")] = None,
) -> None:
    """Print a table: clients' steps a second for batches of several sizes, and ratios of times."""
    first = load(path, set_ or [])
    use_threads(first.compute.threads)
    typer.echo(f"{torch.get_num_threads()} threads\n")
    typer.echo("| rows × tokens | clients | together | one by one | bare | together ÷ one by one | together ÷ bare |")
    typer.echo("|---|---|---|---|---|---|---|")
    for rows, tokens in SHAPES:
        changed = override(first, [f"training.batch_size={rows}", f"task.{first.task.name}.max_tokens={tokens}"])
        config = resolve(changed)
        typer.echo(row(config, clients, measure(config, clients, repeats)))


if __name__ == "__main__":
    script(main)
