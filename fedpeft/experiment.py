"""From settings to the parts of a run: data, model, strategy, clients, plan."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from fedpeft import ranks, rounds
from fedpeft.adapters import AdapterState, Family
from fedpeft.bases import load_tokenizer
from fedpeft.client import Site
from fedpeft.config import RunConfig, choose, digest
from fedpeft.config.data import DataConfig
from fedpeft.config.federation import ByMemory, Declared, Equal, Listed
from fedpeft.config.tasks import Head
from fedpeft.config.training import METRICS, ModelConfig
from fedpeft.data.partitions import deal, histogram
from fedpeft.data.rows import DataReport, Row, Split, prepare
from fedpeft.errors import DataError, PlanError, sentence
from fedpeft.laws import check
from fedpeft.models import AdaptedModel, install, load, most_tokens
from fedpeft.ranks import RankRule
from fedpeft.strategy import Parts, Strategy, build
from fedpeft.tasks import Example, Task, build_task, with_labels
from fedpeft.training import TorchLearner, evaluate
from fedpeft.wire import Session


class FamilySettings(Protocol):
    """Settings of an adapter family."""

    def build(self) -> Family:
        """The family that they describe."""
        ...


SiteRows = Callable[[RunConfig], Sequence[Row]]
"""How a real site gets at its own rows."""


@dataclass(frozen=True)
class Dealt:
    """All rows of a simulation: the held-out ones, and the training rows of each site."""

    sites: tuple[tuple[Row, ...], ...]
    test: tuple[Row, ...]
    report: DataReport
    histograms: tuple[dict[str, Any], ...]


def resolve(config: RunConfig) -> RunConfig:
    """`config` with what it leaves to the data filled in: the labels, in the order of the head's outputs."""
    task = with_labels(config.task.chosen, _split(config.data, config.seed).train)
    return replace(config, task=choose(config.task.table, config.task.name, **{config.task.name: task}))


def deal_rows(config: RunConfig) -> Dealt:
    """The rows of every site and of the server; read once a process for the same settings."""
    return _dealt(config.data, config.federation.clients, config.seed)


def strategy_of(config: RunConfig) -> Strategy:
    """The strategy that the settings describe."""
    return build(parts_of(config))


def parts_of(config: RunConfig) -> Parts:
    """What the settings put a strategy together from."""
    chosen = config.aggregation
    return Parts(
        stage=chosen.stages.build(),
        codec=chosen.codec.chosen.build(),
        method=chosen.merge.chosen.build(),
        optimizer=chosen.optimizer.chosen.build(),
        controls=config.federation.clients if config.training.scaffold else 0,
    )


def ranks_of(config: RunConfig) -> RankRule:
    """How the settings say that nodes come by their ranks."""
    return _RANK_RULES[type(config.federation.ranks.chosen)](config.federation.ranks.chosen)


_RANK_RULES: Mapping[type, Callable[[Any], RankRule]] = {
    Equal: lambda chosen: ranks.equal(),  # noqa: ARG005
    Listed: lambda chosen: ranks.listed(chosen.ranks),
    Declared: lambda chosen: ranks.declared(chosen.default),
    ByMemory: lambda chosen: ranks.by_memory(chosen.ranks, chosen.gigabytes),
}


def check_plan(config: RunConfig, adapted: AdaptedModel) -> None:
    """Raises an error if the plan cannot be run.

    Raises:
        PlanError: two settings cannot go together.
        AdapterError: a pattern matches no tensor.
        DataError: the task cannot use some site's rows.
    """
    for partition, rows in enumerate(deal_rows(config).sites):
        task_of(config).require(rows, f"partition {partition}")
    least = config.federation.quorum or config.federation.cohort
    check(parts_of(config), adapted.spec, ranks_of(config).possible, least)
    room, virtual = most_tokens(adapted), int(adapted.family.peft.get("num_virtual_tokens", 0))
    asked = min(config.task.chosen.max_tokens, adapted.tokenizer.model_max_length)
    if asked > room:
        raise PlanError(
            sentence(
                f"task.{config.task.name}.max_tokens",
                expected=f"at most {room} ({room + virtual} positions less {virtual} virtual tokens)",
                found=asked,
                remedy="lower it",
            )
        )


def adapted_model(config: RunConfig) -> AdaptedModel:
    """The base with the configured adapter on it; loaded once a process for the same settings."""
    return _adapted(config.model, config.adapter.chosen, config.task.chosen.head, config.seed)


def task_of(config: RunConfig) -> Task:
    """The task that the settings describe."""
    return build_task(config.task.chosen)


def site_of(config: RunConfig, partition: int, own_rows: SiteRows | None = None) -> Site:
    """The client of one partition, with its rows of the simulation, or rows of its own."""
    if own_rows:
        examples = task_of(config).encode(own_rows(config), load_tokenizer(config.model), f"partition {partition}")
    else:
        examples = site_examples(config, partition)
    if not examples:
        raise DataError(
            sentence(f"partition {partition}", expected="at least one row", found="none", remedy="give this site data")
        )
    return Site(partition, digest(config), strategy_of(config), learner_of(config, examples))


def learner_of(config: RunConfig, examples: tuple[Example, ...]) -> TorchLearner:
    """A learner on `examples`; learners of one process share the model."""
    return TorchLearner(
        adapted=adapted_model(config),
        task=task_of(config),
        examples=examples,
        settings=config.training,
        seed=config.seed,
        rounds=config.rounds,
        evaluation_batch_size=config.evaluation.batch_size,
    )


def evaluator_of(config: RunConfig) -> rounds.Evaluate:
    """A function that scores an adapter on the server's held-out rows, overall and by group."""
    learner = learner_of(config, test_examples(config))

    def score(adapter: AdapterState) -> rounds.Record:
        install(learner.adapted, adapter)
        return evaluate(learner.adapted, learner.task, learner.examples, learner.evaluation_batch_size)

    return score


def site_examples(config: RunConfig, partition: int) -> tuple[Example, ...]:
    """The tokenised training rows of one site of the simulation."""
    return _examples(config.model, config.task.chosen, config.data, config.federation.clients, config.seed, partition)


def test_examples(config: RunConfig) -> tuple[Example, ...]:
    """The tokenised held-out rows."""
    return _examples(config.model, config.task.chosen, config.data, config.federation.clients, config.seed, -1)


def plan_of(config: RunConfig, run: str, spec: str) -> rounds.Plan:
    """The round loop's view of the settings."""
    return rounds.Plan(
        session=Session(run, digest(config), spec),
        rounds=config.rounds,
        cohort=config.federation.cohort,
        quorum=config.federation.quorum,
        deadline_seconds=config.federation.deadline_seconds,
        evaluate_every=config.evaluation.every,
        evaluate_on_clients=config.evaluation.on_clients,
        metric=config.evaluation.metric,
        metric_sign=METRICS[config.evaluation.metric],
        patience=config.evaluation.patience,
        ranks=ranks_of(config),
        most_norm=config.federation.most_update_norm,
    )


@functools.lru_cache(maxsize=4)
def _split(data: DataConfig, seed: int) -> Split:
    return prepare(data, seed)


@functools.lru_cache(maxsize=4)
def _dealt(data: DataConfig, clients: int, seed: int) -> Dealt:
    split = _split(data, seed)
    indices = deal(split.train, data.partition, clients, seed)
    return Dealt(
        sites=tuple(tuple(split.train[i] for i in of_site) for of_site in indices),
        test=split.test,
        report=split.report,
        histograms=tuple({"partition": p, **histogram(split.train, rows)} for p, rows in enumerate(indices)),
    )


@functools.lru_cache(maxsize=4)
def _adapted(model: ModelConfig, family: FamilySettings, head: Head, seed: int) -> AdaptedModel:
    return load(model, family.build(), head, seed)


@functools.lru_cache(maxsize=2)
def _tokenizer(model: ModelConfig) -> Any:
    return load_tokenizer(model)


@functools.lru_cache(maxsize=256)
def _examples(
    model: ModelConfig, task: object, data: DataConfig, clients: int, seed: int, partition: int
) -> tuple[Example, ...]:
    dealt = _dealt(data, clients, seed)
    rows = dealt.test if partition < 0 else dealt.sites[partition]
    place = "held-out rows" if partition < 0 else f"partition {partition}"
    return build_task(task).encode(rows, _tokenizer(model), place)
