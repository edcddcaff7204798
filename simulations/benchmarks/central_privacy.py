"""What it costs to clip updates and add noise to their mean: a round with central noise over the same round without.

    python -m simulations.benchmarks.central_privacy simulations/demo.toml --repeats 9

Every site takes part in each round, so that both ways train the same sites on the same batches; which of the two goes
first alternates. The figure of a method is the median over repeats of the ratio of the two times, less 1; times are
the processor's, so that what else the machine does is not in them. Beside it stands what the account takes in a round:
ε of all rounds so far, and whether one more can be afforded.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from fedpeft.cli import script
from fedpeft.config import RunConfig, load
from fedpeft.config.privacy import CentralPrivacy
from fedpeft.experiment import adapted_model, population_of, resolve
from fedpeft.privacy import affordable, epsilon
from fedpeft.runs import RunFolder
from fedpeft.training import use_threads
from simulations.benchmarks.overhead import federated_round

METHODS: Mapping[str, Sequence[str]] = {
    "fedavg": ("aggregation.merge.rule=fedavg", "aggregation.merge.fedavg.weights=uniform"),
    "ffa_lora": ("aggregation.merge.rule=ffa_lora", "aggregation.merge.ffa_lora.weights=uniform"),
    "rolora": ("aggregation.merge.rule=rolora", "aggregation.merge.rolora.weights=uniform"),
}
"""What is measured: numbers clipped as they are, and by what they do to the product."""

NOISE = (
    "privacy.mechanism=central",
    "privacy.central.sampler=everyone",
    "privacy.central.noise_multiplier=0.8",
)


def measure(private: RunConfig, plain: RunConfig, repeats: int) -> list[tuple[float, float]]:
    """(processor's seconds of a round with noise, of one without) for each repeat, after one of each as warm-up."""
    pairs = []
    with tempfile.TemporaryDirectory() as name:
        _seconds(private, Path(name) / "warm-up-private")
        _seconds(plain, Path(name) / "warm-up-plain")
        for repeat in range(repeats):
            sides = {"private": private, "plain": plain}
            order = sorted(sides, reverse=bool(repeat % 2))
            seconds = {side: _seconds(sides[side], Path(name) / f"{repeat}-{side}") for side in order}
            pairs.append((seconds["private"], seconds["plain"]))
    return pairs


def accounting_seconds(config: RunConfig) -> float:
    """The mean over all rounds of what the account takes in one of them."""
    promise = config.privacy.chosen
    if not isinstance(promise, CentralPrivacy):
        return 0.0
    expense = promise.expense(population_of(config))
    started = time.process_time()
    for round_ in range(config.rounds):
        history = tuple(replace(expense, round=number + 1) for number in range(round_))
        affordable(history, replace(expense, round=round_ + 1), 8.0, promise.delta)
        epsilon((*history, replace(expense, round=round_ + 1)), promise.delta)
    return (time.process_time() - started) / config.rounds


def _seconds(config: RunConfig, folder: Path) -> float:
    work = partial(federated_round, config, adapted_model(config), RunFolder(folder))
    started = time.process_time()
    work()
    return time.process_time() - started


def main(
    path: Annotated[Path, typer.Argument(help="The settings whose first round is measured.")] = Path(
        "simulations/demo.toml"
    ),
    repeats: Annotated[int, typer.Option(min=1)] = 9,
    methods: Annotated[list[str] | None, typer.Option("--method", help="Give it again for more.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE")] = None,
) -> None:
    """Print how much longer a round takes whose updates are clipped and whose mean gets noise."""
    cohort = load(path, set_ or []).federation.cohort
    everyone = (f"federation.clients={cohort}", *(set_ or []))
    typer.echo(f"{'method':<12}{'private':>10}{'plain':>10}{'more':>8}{'account':>10}")
    for method in methods or METHODS:
        plain = resolve(load(path, [*everyone, *METHODS[method]]))
        noisy = resolve(load(path, [*everyone, *METHODS[method], *NOISE]))
        use_threads(plain.compute.threads)
        pairs = measure(noisy, plain, repeats)
        private, bare = (statistics.median(side) for side in zip(*pairs, strict=True))
        more = statistics.median(one / other for one, other in pairs) - 1
        typer.echo(
            f"{method:<12}{private:>8.3f} s{bare:>8.3f} s{more:>+8.1%}{1000 * accounting_seconds(noisy):>7.0f} ms"
        )


if __name__ == "__main__":
    script(main)
