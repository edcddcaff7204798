"""How many times faster than Apple's pfl, on the same model, clients, batches and local steps.

    make bench-pfl-env
    python -m simulations.benchmarks.against_pfl simulations/demo.toml --rounds 5

Whole processes in turns, as `simulations.benchmarks.sides` runs them. What pfl trains on is prepared before its clock
starts: the base, the adapter as rounds begin with it, and the batches of all clients, so that it neither tokenises nor
deals rows. It runs as one process of two threads, and as two processes of one thread; ours is held against the faster.
The learning rate has no schedule, as pfl has none within a round.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import json
import socket
import statistics
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from fedpeft.bases import model_path
from fedpeft.batches import batches_from
from fedpeft.cli import script
from fedpeft.config import RunConfig, load
from fedpeft.errors import ConfigError, sentence
from fedpeft.evaluation import padding
from fedpeft.experiment import adapted_model, resolve, site_examples, start_of, strategy_of, task_of
from fedpeft.gathering import cohort_of
from fedpeft.models import save_adapter
from simulations.benchmarks import sides
from simulations.benchmarks.sides import Took

HOME = Path(".venv-bench")
"""The environment that has pfl."""

PLAIN = ("training.warmup_fraction=0.0", "training.final_fraction=1.0", "training.accumulation=1")
"""Settings under which our local steps are those that pfl knows."""

SAME = ("torch", "transformers", "peft")
"""Libraries that both sides have of one version."""


def require(home: Path = HOME) -> None:
    """Raises ConfigError if there is no environment with pfl."""
    if not any(home.glob("lib/python*/site-packages/pfl/__init__.py")):
        raise ConfigError(
            sentence(
                "the part pfl",
                expected=f"pfl in {home}",
                found="none",
                remedy="make it with `make bench-pfl-env`",
            )
        )


def task(first: RunConfig, rounds: int) -> RunConfig:
    """The run as both sides can do it."""
    return sides.task(first, rounds, PLAIN)


def visits(config: RunConfig) -> Iterator[tuple[int, int, list[Mapping[str, torch.Tensor]]]]:
    """(round, partition, batches) of all that our clients train on, in order; a batch is what the task collates."""
    training, seen = config.training, dict.fromkeys(range(config.federation.clients), 0)
    pad, state = padding(adapted_model(config)), strategy_of(config).init("benchmark", config.seed, start_of(config))
    for number in range(1, config.rounds + 1):
        known = replace(state, round=number - 1)
        for partition in cohort_of(known, tuple(seen), config.federation.cohort, config.federation.clients):
            stream = batches_from(
                site_examples(config, partition), training.batch_size, config.seed, partition, seen[partition]
            )
            taken = list(itertools.islice(stream, training.steps))
            seen[partition] += training.steps
            yield number, partition, [task_of(config).collate(batch, pad, torch.device("cpu")) for batch in taken]


def prepare(settings: RunConfig, folder: Path) -> Path:
    """`folder` holds what `simulations.benchmarks.usual_pfl` reads: `base`, `adapter` and `job.json`."""
    config = resolve(settings)
    adapted, training, base = adapted_model(config), config.training, folder / "base"
    base.mkdir(parents=True)
    model: Any = adapted.model
    model.get_base_model().config.save_pretrained(base)
    for weights in Path(model_path(config.model)).glob("*.safetensors"):
        (base / weights.name).symlink_to(weights.resolve())
    save_adapter(adapted, start_of(config), folder / "adapter")
    job = {
        "auto": config.task.chosen.head.auto,
        "rounds": config.rounds,
        "cohort": config.federation.cohort,
        "batch_size": training.batch_size,
        "learning_rate": training.learning_rate,
        "head_learning_rate": training.head_learning_rate or training.learning_rate,
        "weight_decay": training.weight_decay,
        "max_gradient_norm": training.max_gradient_norm,
        "visits": [
            {"round": number, "partition": partition, "batches": [_lists(batch) for batch in batches]}
            for number, partition, batches in visits(config)
        ],
    }
    (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
    return folder


def _lists(batch: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    return {name: values.tolist() for name, values in batch.items()}


def pfls(config: RunConfig, folder: Path, processes: int, home: Path = HOME) -> Took:
    """The same by `simulations.benchmarks.usual_pfl`, on two threads in all."""
    whole, said = run(prepare(config, folder / "pfl"), processes, home)
    return Took(whole, statistics.median(late - early for early, late in itertools.pairwise(said["rounds"])))


def run(folder: Path, processes: int, home: Path = HOME, threads: int = 2) -> tuple[float, Mapping[str, Any]]:
    """Seconds of so many processes of pfl on what was prepared, with so many threads in all, and what the first said.

    Raises:
        BadParameter: one failed or took too long, or has other libraries than we have.
    """
    each = max(1, threads // processes)
    command = ["-m", "simulations.benchmarks.usual_pfl", str(folder), "--threads", str(each)]
    with ThreadPoolExecutor(processes) as pool:
        running = [
            pool.submit(sides.process, command, folder, str(home.absolute() / "bin" / "python"), told)
            for told in _workers(processes, each)
        ]
        answers = [one.result() for one in running]
    said = json.loads(answers[0][1].splitlines()[-1])
    _require_same(said["versions"])
    return max(seconds for seconds, _ in answers), said


def _workers(processes: int, threads: int) -> Sequence[Mapping[str, str]]:
    """The environment of each process, by which pfl knows the others; they meet at a port that is free now.

    Threads that wait sleep: where others use the cores too, those that spin make pfl's two threads ten times slower.
    """
    told = {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
    if processes == 1:
        return [told]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    addresses = ",".join(f"127.0.0.1:{port + at}" for at in range(processes))
    return [{**told, "PFL_WORKER_ADDRESSES": addresses, "PFL_WORKER_RANK": str(rank)} for rank in range(processes)]


def _require_same(versions: Mapping[str, str]) -> None:
    """Raises BadParameter if pfl has other libraries than we have, build labels aside."""
    own = {name: importlib.metadata.version(name) for name in SAME}
    other = {name: versions[name] for name in SAME}
    if any(own[name].partition("+")[0] != other[name].partition("+")[0] for name in SAME):
        raise typer.BadParameter(f".venv-bench has {other}, and .venv {own}; make both anew")


SIDES: Mapping[str, sides.Side] = {
    "pfl, one process of two threads": partial(pfls, processes=1),
    "pfl, two processes of one thread": partial(pfls, processes=2),
    sides.OURS: sides.ours,
}


def main(
    path: Annotated[Path, typer.Argument(help="The federation.")] = Path("simulations/demo.toml"),
    rounds: Annotated[int, typer.Option(min=3)] = 5,
    repeats: Annotated[int, typer.Option(min=1)] = 1,
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE")] = None,
) -> None:
    """Print seconds of all sides, and how many times ours the faster of pfl's are."""
    require()
    config = task(load(path, set_ or []), rounds)
    found = sides.measure(config, repeats, SIDES)
    typer.echo("\n".join([sides.HEADING, *sides.rows(config.name, found)]))
    for name, values in sides.over(found).items():
        typer.echo(f"pfl over ours, {name}: {', '.join(f'{value:.2f}' for value in values)}")


if __name__ == "__main__":
    script(main)
