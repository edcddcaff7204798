"""What it costs to protect each example: local training with clipped gradients and noise over plain training.

    python -m simulations.benchmarks.example_privacy simulations/demo.toml --repeats 9

Each repeat trains one site for a round in both ways, on the same batches from the same adapter; which of the two goes
first alternates. The figure of a method is the median over repeats of the ratio of the two times.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from fedpeft import gradient_checks
from fedpeft.adapters import fixed
from fedpeft.cli import script
from fedpeft.client import FitJob
from fedpeft.config import load
from fedpeft.experiment import learner_of, resolve, site_examples
from fedpeft.privacy.examples import SHUFFLED, ExamplePrivacy
from fedpeft.training import TorchLearner, use_threads

METHODS: Mapping[str, Sequence[str]] = {
    "lora": ("adapter.family=lora",),
    "ffa": ("adapter.family=lora", "adapter.lora.freeze_a=true"),
    "dora": ("adapter.family=lora", "adapter.lora.dora=true"),
    "ia3": ("adapter.family=ia3",),
    "bitfit": ("adapter.family=bitfit",),
    "prompt": ("adapter.family=prompt_tuning",),
    "oft": ("adapter.family=oft", "adapter.oft.block_size=32"),
    "fish_mask": ("adapter.family=fish_mask",),
}
"""What is measured, and the settings that ask for it. The last two cannot be computed for all rows at once."""

MOST = 2.5
"""The ratio that every method but the last two is to stay under."""


def measure(learner: TorchLearner, repeats: int) -> list[tuple[float, float]]:
    """(seconds of a private fit, seconds of a plain one) for each repeat, after one of each as warm-up."""
    private = replace(learner, private=ExamplePrivacy(clip_norm=1.0, noise_multiplier=1.0, sampler=SHUFFLED))
    _seconds(private)
    _seconds(learner)
    pairs = []
    for repeat in range(repeats):
        order = (private, learner) if repeat % 2 else (learner, private)
        seconds = {id(one): _seconds(one) for one in order}
        pairs.append((seconds[id(private)], seconds[id(learner)]))
    return pairs


def _seconds(learner: TorchLearner) -> float:
    started = time.perf_counter()
    learner.fit(learner.adapted.initial, FitJob(1, 0, fixed(learner.spec), 0))
    return time.perf_counter() - started


def main(
    path: Annotated[Path, typer.Argument(help="The settings whose first site is trained.")] = Path(
        "simulations/demo.toml"
    ),
    repeats: Annotated[int, typer.Option(min=1)] = 9,
    methods: Annotated[list[str] | None, typer.Option("--method", help="Give it again for more.")] = None,
    threads: Annotated[int, typer.Option(min=1)] = 1,
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE")] = None,
) -> None:
    """Print how many times as long local training takes where each example is protected."""
    logging.getLogger(gradient_checks.__name__).setLevel(logging.INFO)
    logging.basicConfig(format="%(message)s")
    use_threads(threads)
    typer.echo(f"{'method':<12}{'private':>10}{'plain':>10}{'ratio':>8}")
    for method in methods or METHODS:
        config = resolve(load(path, [*METHODS[method], *(set_ or [])]))
        use_threads(threads)
        pairs = measure(learner_of(config, site_examples(config, 0)), repeats)
        private, plain = (statistics.median(side) for side in zip(*pairs, strict=True))
        ratio = statistics.median(one / other for one, other in pairs)
        typer.echo(f"{method:<12}{private:>8.3f} s{plain:>8.3f} s{ratio:>8.2f}")


if __name__ == "__main__":
    script(main)
