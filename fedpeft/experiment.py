"""From settings to the parts of a run: data, model, strategy, clients, plan."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fedpeft import ranks, rounds
from fedpeft.adapters import AdapterState
from fedpeft.bases import cores_for, load_tokenizer
from fedpeft.client import Site
from fedpeft.config import Choice, RunConfig, choose, digest
from fedpeft.config.data import DataConfig
from fedpeft.config.federation import ByMemory, Declared, Equal, Listed
from fedpeft.config.privacy import ExampleLevel, Promise, in_sums, settled
from fedpeft.config.tasks import TaskSettings
from fedpeft.config.training import METRICS, ModelConfig
from fedpeft.data.partitions import deal, histogram
from fedpeft.data.rows import DataReport, Row, Split, prepare
from fedpeft.errors import DataError, PlanError, sentence
from fedpeft.evaluation import evaluate, sampled
from fedpeft.fisher import with_places
from fedpeft.gathering import Asking
from fedpeft.laws import check
from fedpeft.loaded import FamilySettings, arguments_of, loaded
from fedpeft.models import AdaptedModel, install, most_tokens
from fedpeft.privacy import Mechanism, Population, affordable, epsilon
from fedpeft.privacy.examples import ExamplePrivacy
from fedpeft.quarantine import Budget
from fedpeft.ranks import RankRule
from fedpeft.strategy import Parts, Strategy, build
from fedpeft.tasks import Encoded, Sample, Task, build_task, with_labels
from fedpeft.training import TorchLearner
from fedpeft.trunk import cached
from fedpeft.updates import ServerState, Spent
from fedpeft.wire import Session

SiteRows = Callable[[RunConfig], Sequence[Row]]
"""How a real site gets at its own rows."""

SiteTask = Callable[[RunConfig], Task]
"""How a site trains in a way of its own: the run's settings to the task that takes the place of theirs."""


@dataclass(frozen=True)
class Dealt:
    """All rows of a simulation: the held-out ones, the training rows of each site, and the server's own."""

    sites: tuple[tuple[Row, ...], ...]
    test: tuple[Row, ...]
    report: DataReport
    histograms: tuple[dict[str, Any], ...]
    server: tuple[Row, ...] = ()


def resolve(config: RunConfig) -> RunConfig:
    """`config` with what it leaves open filled in: labels, in the order of the head's outputs, metric, noise, workers.

    Raises:
        PlanError: the task does not measure the metric.
    """
    chosen = config.task.chosen
    task = with_labels(chosen, _split(config.data, chosen.roles, config.seed).train)
    return replace(
        config,
        task=choose(config.task.table, config.task.name, **{config.task.name: task}),
        evaluation=replace(config.evaluation, metric=metric_of(config)),
        privacy=_settled(config),
        compute=replace(config.compute, workers=config.workers_on(cores_for(config.model))),
    )


def _settled(config: RunConfig) -> Choice:
    """The settings of privacy with what they leave open, which for examples the smallest site decides."""
    population = population_of(config)
    if isinstance(config.privacy.chosen, ExampleLevel):
        population = replace(population, rows=min(map(len, deal_rows(config).sites)))
    return settled(config.privacy, population, config.rounds, sums=config.federation.channel.name == "secure")


def metric_of(config: RunConfig) -> str:
    """The figure that the run shows and watches: that of its settings, or the task's main one.

    Raises:
        PlanError: the task does not measure it.
    """
    measured = config.task.chosen.metrics
    metric = config.evaluation.metric or measured[0]
    if metric not in measured:
        raise PlanError(
            sentence(
                "evaluation.metric",
                expected=f"one of {', '.join(measured)}, which {config.task.name} measures",
                found=metric,
                remedy="name one of them, or none",
            )
        )
    return str(metric)


def deal_rows(config: RunConfig) -> Dealt:
    """The rows of every site and of the server; read once a process for the same settings."""
    return _dealt(config.data, config.task.chosen.roles, config.federation.clients, config.seed)


def strategy_of(config: RunConfig) -> Strategy:
    """The strategy that the settings describe."""
    return build(parts_of(config))


def parts_of(config: RunConfig) -> Parts:
    """What the settings put a strategy together from."""
    chosen = config.aggregation
    mechanism, channel = in_sums(config.privacy, population_of(config), config.federation.channel.chosen.build())
    channel = replace(channel, seed=config.seed) if channel else None
    return Parts(
        stage=chosen.stages.build(),
        codec=chosen.codec.chosen.build(),
        method=chosen.merge.chosen.build(),
        optimizer=chosen.optimizer.chosen.build(),
        controls=config.federation.clients if config.training.scaffold else 0,
        mechanism=mechanism,
        channel=channel,
        seed=config.seed,
        downlink=chosen.downlink.chosen.build(),
        builds=chosen.first == "built",
    )


def population_of(config: RunConfig) -> Population:
    """Of whom a private round draws, and about how many."""
    training = config.training
    batch = training.batch_size * training.accumulation
    return Population(config.federation.clients, config.federation.cohort, batch=batch, steps=training.steps)


def spent_of(config: RunConfig, history: tuple[Spent, ...]) -> float | None:
    """The ε that `history` amounts to at the settings' δ; None in a run that promises nothing."""
    return epsilon(history, config.privacy.chosen.delta) if isinstance(config.privacy.chosen, Promise) else None


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
    for partition in range(config.federation.clients):
        site_examples(config, partition)
    metric_of(config)
    if config.aggregation.first == "built" and adapted.family.chosen:
        raise PlanError(
            sentence(
                "aggregation.first",
                expected=f"sent, because what {adapted.family.name} trains is chosen by rows that the server has alone",
                found="built",
                remedy='set aggregation.first = "sent"',
            )
        )
    if admit := task_of(config).admit:
        admit(adapted.model)
    least = config.federation.quorum or config.federation.cohort
    carries = config.federation.late == "carry"
    spare = config.federation.spare > 0
    check(parts_of(config), adapted.spec, ranks_of(config).possible, least, carries=carries, spare=spare)
    for key in ("max_tokens", "max_target_tokens"):
        _require_positions(config, adapted, key)


def _require_positions(config: RunConfig, adapted: AdaptedModel, key: str) -> None:
    """Raises PlanError if the task's bound `key`, where it has that, is above the tokens that the base can read."""
    room, virtual = most_tokens(adapted), int(adapted.family.peft.get("num_virtual_tokens", 0))
    asked = min(getattr(config.task.chosen, key, 0), getattr(adapted.tokenizer, "model_max_length", 0))
    if asked > room:
        raise PlanError(
            sentence(
                f"task.{config.task.name}.{key}",
                expected=f"at most {room} ({room + virtual} positions less {virtual} virtual tokens)",
                found=asked,
                remedy="lower it",
            )
        )


def adapted_model(config: RunConfig) -> AdaptedModel:
    """The base with the configured adapter on it; loaded once a process for the same settings."""
    return loaded(*arguments_of(config))


def start_of(config: RunConfig) -> AdapterState:
    """The adapter that the first round starts from.

    Raises:
        PlanError: what is trained has to be chosen by rows of the server's own, and there are none.
    """
    adapted = adapted_model(config)
    if not adapted.family.chosen:
        return adapted.initial
    return _chosen(config.model, config.adapter.chosen, config.task.chosen, config.data, config.seed)


@functools.lru_cache(maxsize=2)
def _chosen(
    model: ModelConfig, family: FamilySettings, task: TaskSettings, data: DataConfig, seed: int
) -> AdapterState:
    chosen = build_task(task)
    rows = _split(data, task.roles, seed).server
    return with_places(
        loaded(model, family, task.head, seed), chosen, chosen.encode(rows, _tokenizer(model), "rows of the server")
    )


def release_models() -> None:
    """The models that this process keeps are let go, as far as nobody else holds them."""
    loaded.cache_clear()


def task_of(config: RunConfig) -> Task:
    """The task that the settings describe."""
    return build_task(config.task.chosen)


def site_of(
    config: RunConfig, partition: int, own_rows: SiteRows | None = None, own_task: SiteTask | None = None
) -> Site:
    """The client of one partition, with its rows of the simulation or its own, and the run's task or its own.

    Raises:
        DataError: there are no rows, fewer than a promise was made for, or one that the task cannot use.
    """
    task = own_task(config) if own_task else task_of(config)
    if own_rows or own_task:
        rows = own_rows(config) if own_rows else deal_rows(config).sites[partition]
        examples = task.encode(rows, _tokenizer(config.model), f"partition {partition}")
    else:
        examples = site_examples(config, partition)
    if not examples:
        raise DataError(
            sentence(f"partition {partition}", expected="at least one row", found="none", remedy="give this site data")
        )
    private = _private(config, len(examples), partition)
    learner = replace(learner_of(config, examples), task=_on_base(config, task), private=private)
    return Site(partition, digest(config), strategy_of(config), learner)


def _private(config: RunConfig, rows: int, partition: int) -> ExamplePrivacy | None:
    """How the client of a partition protects its examples, of which it has `rows`."""
    chosen = config.privacy.chosen
    if not isinstance(chosen, ExampleLevel):
        return None
    if rows < chosen.rows:
        raise DataError(
            sentence(
                f"rows of partition {partition}",
                expected=f"at least {chosen.rows}, for which privacy.example makes its promise",
                found=rows,
                remedy="leave this site out, or set privacy.example.rows to what the smallest site has",
            )
        )
    return chosen.training()


def learner_of(config: RunConfig, examples: tuple[Encoded, ...]) -> TorchLearner:
    """A learner on `examples`; learners of one process share the model."""
    return TorchLearner(
        adapted=adapted_model(config),
        task=_on_base(config, task_of(config)),
        examples=examples,
        settings=config.training,
        seed=config.seed,
        rounds=config.rounds,
        evaluation_batch_size=config.evaluation.batch_size,
    )


def _on_base(config: RunConfig, task: Task) -> Task:
    """The task as the run's base computes it, with what is kept of lower layers."""
    return cached(task, adapted_model(config), int(config.training.cache_gigabytes * 1e9))


def evaluator_of(config: RunConfig) -> rounds.Evaluate:
    """A function that scores an adapter on the server's held-out rows, overall and by group."""
    learner = learner_of(config, test_examples(config))

    def score(adapter: AdapterState) -> rounds.Record:
        install(learner.adapted, adapter)
        return evaluate(learner.adapted, learner.task, learner.examples, learner.evaluation_batch_size)

    return score


def samples_of(config: RunConfig, adapter: AdapterState, most: int) -> tuple[Sample, ...]:
    """What the model answers with `adapter` to the first `most` held-out rows; nothing where a task has no words."""
    learner = learner_of(config, test_examples(config)[:most])
    install(learner.adapted, adapter)
    return sampled(learner.adapted, learner.task, learner.examples)


def site_examples(config: RunConfig, partition: int) -> tuple[Encoded, ...]:
    """The tokenised training rows of one site of the simulation."""
    return _examples(config.model, config.task.chosen, config.data, config.federation.clients, config.seed, partition)


def test_examples(config: RunConfig) -> tuple[Encoded, ...]:
    """The tokenised held-out rows."""
    return _examples(config.model, config.task.chosen, config.data, config.federation.clients, config.seed, -1)


def plan_of(config: RunConfig, run: str, spec: str) -> rounds.Plan:
    """The round loop's view of the settings."""
    federation, failures = config.federation, config.federation.failures
    return rounds.Plan(
        session=Session(run, digest(config), spec),
        rounds=config.rounds,
        asking=Asking(
            cohort=federation.cohort,
            quorum=federation.quorum,
            deadline_seconds=federation.deadline_seconds,
            ranks=ranks_of(config),
            clients=federation.clients,
            spare=federation.spare,
            retries=federation.retries,
            wait_seconds=federation.wait_seconds,
            carry=federation.late == "carry",
            most_norm=federation.most_update_norm,
            most_examples=federation.most_examples,
        ),
        evaluate_every=config.evaluation.every,
        evaluate_on_clients=config.evaluation.on_clients,
        metric=metric_of(config),
        metric_sign=METRICS[metric_of(config)],
        patience=config.evaluation.patience,
        budget=Budget(failures.budget, failures.window, failures.rest),
        affordable=_affordable(config, parts_of(config).mechanism),
    )


def _affordable(config: RunConfig, mechanism: Mechanism | None) -> Callable[[ServerState], bool]:
    """Whether a state can pay for one more round out of the settings' ε."""
    promise = config.privacy.chosen
    spent = mechanism.charge(0) if mechanism else None
    if spent is None or not promise.epsilon:
        return lambda state: True  # noqa: ARG005
    return lambda state: affordable(state.privacy.history, spent, promise.epsilon, promise.delta)


@functools.lru_cache(maxsize=4)
def _split(data: DataConfig, roles: tuple[str, ...], seed: int) -> Split:
    return prepare(data, seed, roles)


@functools.lru_cache(maxsize=4)
def _dealt(data: DataConfig, roles: tuple[str, ...], clients: int, seed: int) -> Dealt:
    split = _split(data, roles, seed)
    indices = deal(split.train, data.partition, clients, seed)
    return Dealt(
        sites=tuple(tuple(split.train[i] for i in of_site) for of_site in indices),
        test=split.test,
        report=split.report,
        histograms=tuple({"partition": p, **histogram(split.train, rows)} for p, rows in enumerate(indices)),
        server=split.server,
    )


@functools.lru_cache(maxsize=2)
def _tokenizer(model: ModelConfig) -> Any:
    return load_tokenizer(model)


@functools.lru_cache(maxsize=256)
def _examples(
    model: ModelConfig, task: TaskSettings, data: DataConfig, clients: int, seed: int, partition: int
) -> tuple[Encoded, ...]:
    dealt = _dealt(data, task.roles, clients, seed)
    rows = dealt.test if partition < 0 else dealt.sites[partition]
    place = "held-out rows" if partition < 0 else f"partition {partition}"
    return build_task(task).encode(rows, _tokenizer(model), place)
