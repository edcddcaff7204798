"""What a federation is measured against: training without it, on the same budget of steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fedpeft.adapters import AdapterSpec, AdapterState
from fedpeft.client import FitJob
from fedpeft.config import RunConfig, choose
from fedpeft.evaluation import evaluate_base
from fedpeft.experiment import (
    adapted_model,
    deal_rows,
    evaluator_of,
    learner_of,
    metric_of,
    site_examples,
    start_of,
    strategy_of,
    test_examples,
)
from fedpeft.tasks import Encoded

_POOLED, _FROZEN = -2, -3
"""Partition numbers under which the bounds draw their batches; no site has them."""

_HEAD_ALONE = 10.0
"""Times the head's learning rate; of 1, 4 and 10 the best for the demo's frozen bound (.505, .523, .532)."""


@dataclass(frozen=True)
class Bound:
    """A name for the table, and how to measure it: an evaluation, and more figures beside it."""

    name: str
    measure: Callable[[RunConfig], Mapping[str, Any]]


def frozen_head(config: RunConfig) -> Mapping[str, Any]:
    """The base as it is, with a head trained on all sites' rows pooled, for all of the federation's steps.

    A head alone takes a larger learning rate than one that learns beside an adapter. Where the task has no head of
    its own, there is nothing to train.
    """
    if not config.task.chosen.head.labels:
        bare = learner_of(config, test_examples(config))
        found = evaluate_base(bare.adapted, bare.task, bare.examples, bare.evaluation_batch_size)
        return {"name": "frozen model", "evaluation": found}
    rate = _HEAD_ALONE * (config.training.head_learning_rate or config.training.learning_rate)
    head = replace(
        config,
        adapter=choose(config.adapter.table, "head_only"),
        training=replace(config.training, head_learning_rate=rate),
    )
    return {"evaluation": _train_alone(head, _pooled(head), _total_steps(config), _FROZEN)}


def sites_alone(config: RunConfig) -> Mapping[str, Any]:
    """The mean over sites that each train alone, for as many steps as the federation asks of a site on average."""
    clients = config.federation.clients
    steps = max(1, round(_total_steps(config) / clients))
    found = [_train_alone(config, site_examples(config, site), steps, site) for site in range(clients)]
    return {"evaluation": _mean(found), "spread": float(np.std([one[metric_of(config)] for one in found]))}


def pooled_data(config: RunConfig) -> Mapping[str, Any]:
    """One learner on all sites' rows pooled, for all of the federation's steps."""
    return {"evaluation": _train_alone(config, _pooled(config), _total_steps(config), _POOLED)}


BOUNDS = (
    Bound("frozen model, trained head", frozen_head),
    Bound("sites alone", sites_alone),
    Bound("pooled data", pooled_data),
)
"""Every bound that a simulation reports, in the order of the table."""


def measure_bounds(config: RunConfig, bounds: tuple[Bound, ...], report: Callable[[str], None]) -> list[dict[str, Any]]:
    """A journal row for each of `bounds`; `report` hears each one's name before it begins."""
    rows = []
    for bound in bounds:
        report(bound.name)
        started = time.perf_counter()
        found = bound.measure(config)
        rows.append({"name": bound.name, **found, "seconds": time.perf_counter() - started})
    return rows


def _train_alone(config: RunConfig, examples: tuple[Encoded, ...], steps: int, partition: int) -> dict[str, Any]:
    """The score of an adapter trained on `examples` for `steps` with one learning-rate schedule over them all."""
    adapted = adapted_model(config)
    alone = replace(config, rounds=1, training=replace(config.training, steps=steps))
    job = FitJob(round=1, partition=partition, frozen=_frozen(config, adapted.spec), position=0)
    fitted = learner_of(alone, examples).fit(start_of(config), job)
    return dict(evaluator_of(config)(AdapterState(adapted.spec, fitted.after)))


def _frozen(config: RunConfig, spec: AdapterSpec) -> tuple[str, ...]:
    """What the federation never trains either; a head on a frozen base is trained all the same."""
    return () if config.adapter.name == "head_only" else strategy_of(config).stage.constant(spec)


def _pooled(config: RunConfig) -> tuple[Encoded, ...]:
    sites = range(len(deal_rows(config).sites))
    return tuple(example for site in sites for example in site_examples(config, site))


def _total_steps(config: RunConfig) -> int:
    return config.rounds * config.federation.cohort * config.training.steps


def _mean(found: list[dict[str, Any]]) -> dict[str, Any]:
    """The mean of evaluations, figure by figure, groups too."""
    first = found[0]
    mean: dict[str, Any] = {key: float(np.mean([one[key] for one in found])) for key in first if key != "groups"}
    mean["rows"] = first["rows"]
    if "groups" in first:
        mean["groups"] = {name: _mean([one["groups"][name] for one in found]) for name in first["groups"]}
    return mean
