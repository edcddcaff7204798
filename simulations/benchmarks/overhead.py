"""What the round machinery costs over the same local steps in a bare PyTorch loop.

    python -m simulations.benchmarks.overhead simulations/demo.toml --repeats 5

Each repeat trains one round of the federation in-process (requests encoded, adapters installed, trained,
extracted, updates encoded, decoded, checked and merged, journal and checkpoint written), and the same steps on
the same batches in a loop that knows nothing of federations; which of the two goes first alternates. The figure
is the median over repeats of the ratio of the two times, less 1.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from fedpeft import checkpoint, journal, rounds
from fedpeft.batches import batches_from
from fedpeft.cli import script
from fedpeft.config import RunConfig, load
from fedpeft.engines.local import LocalTransport
from fedpeft.experiment import adapted_model, plan_of, resolve, site_examples, site_of, strategy_of
from fedpeft.memory import FolderMemory
from fedpeft.models import AdaptedModel
from fedpeft.runs import RunFolder
from fedpeft.training import use_threads
from fedpeft.updates import ServerState


def bare_round(config: RunConfig, adapted: AdaptedModel, cohort: Sequence[int]) -> None:
    """The cohort's local steps of round 1, and nothing else."""
    pad = int(adapted.tokenizer.pad_token_id)
    for partition in cohort:
        bare_fit(config, adapted.model, pad, partition)


def bare_fit(config: RunConfig, model: torch.nn.Module, pad: int, partition: int) -> int:
    """One client's local steps of round 1 on whatever of `model` is trained; how many examples that were."""
    training, seen = config.training, 0
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.train()
    optimizer = torch.optim.AdamW(parameters, lr=training.learning_rate, weight_decay=training.weight_decay)
    stream = batches_from(site_examples(config, partition), training.batch_size, config.seed, partition, 0)
    for drawn in islice(stream, training.steps):
        examples: list[Any] = list(drawn)
        width = max(len(example.tokens) for example in examples)
        ids = torch.full((len(examples), width), pad)
        mask = torch.zeros((len(examples), width), dtype=torch.long)
        for row, example in enumerate(examples):
            ids[row, : len(example.tokens)] = torch.tensor(example.tokens)
            mask[row, : len(example.tokens)] = 1
        labels = torch.tensor([example.label for example in examples])
        logits = model(input_ids=ids, attention_mask=mask).logits
        torch.autograd.backward(torch.nn.functional.cross_entropy(logits, labels))
        torch.nn.utils.clip_grad_norm_(parameters, training.max_gradient_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seen += len(examples)
    return seen


def federated_round(config: RunConfig, adapted: AdaptedModel, folder: RunFolder) -> tuple[int, ...]:
    """Round 1 as a run does it, but for its evaluation; the cohort that trained."""
    strategy = strategy_of(config)
    start = strategy.init("benchmark", config.seed, adapted.initial)
    transport = LocalTransport(
        config.federation.clients, lambda partition: site_of(config, partition), FolderMemory(folder.memories)
    )
    settled: list[rounds.Record] = []

    def settle(record: rounds.Record, state: ServerState) -> None:
        journal.append(folder.journal, record)
        checkpoint.save(folder.checkpoint, state)
        settled.append(record)

    plan = replace(plan_of(config, start.run, adapted.spec.digest), rounds=1)
    rounds.run(strategy, plan, start, transport, _unscored, rounds.Observer(lambda *_: None, settle))
    return tuple(settled[0]["cohort"])


def _unscored(_adapter: object) -> rounds.Record:
    return {"loss": 0.0, "accuracy": 0.0, "macro_f1": 0.0, "rows": 0, "groups": {}}


def measure(config: RunConfig, repeats: int) -> list[tuple[float, float]]:
    """(seconds of a federated round, seconds of the bare loop) for each repeat, after one round of warm-up."""
    adapted = adapted_model(config)
    pairs = []
    with tempfile.TemporaryDirectory() as name:
        cohort = federated_round(config, adapted, RunFolder(Path(name) / "warm-up"))
        bare_round(config, adapted, cohort)
        for repeat in range(repeats):
            folder = RunFolder(Path(name) / str(repeat))
            jobs: list[tuple[str, Callable[[], object]]] = [
                ("federated", partial(federated_round, config, adapted, folder)),
                ("bare", partial(bare_round, config, adapted, cohort)),
            ]
            seconds = {job: _timed(work) for job, work in (jobs if repeat % 2 else reversed(jobs))}
            pairs.append((seconds["federated"], seconds["bare"]))
    return pairs


def _timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def main(
    path: Annotated[Path, typer.Argument(help="The settings whose first round is measured.")] = Path(
        "simulations/demo.toml"
    ),
    repeats: Annotated[int, typer.Option(min=1)] = 5,
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE")] = None,
) -> None:
    """Print the overhead of the round machinery over a bare PyTorch loop."""
    config = resolve(load(path, set_ or []))
    use_threads(config.compute.threads)
    pairs = measure(config, repeats)
    for federated, bare in pairs:
        typer.echo(f"federated {federated:7.3f} s   bare {bare:7.3f} s   overhead {federated / bare - 1:+.1%}")
    typer.echo(f"median overhead {statistics.median(federated / bare for federated, bare in pairs) - 1:+.1%}")


if __name__ == "__main__":
    script(main)
