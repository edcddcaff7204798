"""SCAFFOLD on clients whose loss is a parabola: what it converges to, by hand, under SGD and under Adam."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch

from fedpeft import rounds
from fedpeft.adapters import AdapterSpec, AdapterState, ModuleSpec
from fedpeft.client import FitJob, Fitted, Site
from fedpeft.codecs import dense
from fedpeft.engines.local import LocalTransport
from fedpeft.merges import Method, rule
from fedpeft.optimizers import sgd
from fedpeft.stages import identity
from fedpeft.strategy import Parts, Strategy, build
from fedpeft.updates import Memory
from fedpeft.wire import Session
from tests import toys


class Kept:
    """Memories in a dictionary: each client's newest."""

    def __init__(self) -> None:
        self.found: dict[int, Memory] = {}

    def load(self, run: str, partition: int, round_: int) -> Memory:
        return self.found.get(partition, Memory())

    def save(self, run: str, partition: int, round_: int, memory: Memory) -> None:
        self.found[partition] = memory


SPEC = AdapterSpec("base", "head_only", (ModuleSpec("head", "full", 0, 1.0, (("weight", (2,)),)),))
CURVATURES = (np.array([1.0, 4.0], np.float32), np.array([3.0, 0.5], np.float32), np.array([0.2, 2.0], np.float32))
TARGETS = (np.array([1.0, -1.0], np.float32), np.array([-2.0, 3.0], np.float32), np.array([5.0, 0.5], np.float32))
OPTIMUM = np.sum([h * t for h, t in zip(CURVATURES, TARGETS, strict=True)], axis=0) / np.sum(CURVATURES, axis=0)
STEPS = 10
SESSION = Session(toys.RUN, toys.CONFIG, SPEC.digest)


@dataclass(frozen=True)
class Parabola:
    """½ h (x − t)² for one client, walked down by a torch optimiser."""

    partition: int
    optimizer: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]

    @property
    def spec(self) -> AdapterSpec:
        return SPEC

    def fit(self, adapter: AdapterState, job: FitJob) -> Fitted:
        h, t = torch.from_numpy(CURVATURES[self.partition]), torch.from_numpy(TARGETS[self.partition])
        x = torch.nn.Parameter(torch.from_numpy(adapter.tensors["head.weight"].copy()))
        correction = torch.from_numpy(job.correction.get("head.weight", np.zeros(2, np.float32)))
        optimizer, total = self.optimizer([x]), torch.zeros(2)
        for _ in range(STEPS):
            gradient = h * (x.detach() - t)
            total += gradient
            x.grad = gradient + correction
            optimizer.step()
        gradients = {key: (total / STEPS).numpy() for key in job.correction}
        after = {"head.weight": x.detach().numpy().copy()}
        return Fitted(adapter.tensors, after, 1, 1, job.position + STEPS, {"loss": 0.0}, gradients)

    def evaluate(self, adapter: AdapterState) -> Mapping[str, float]:
        return {"accuracy": 0.0, "rows": float(adapter.tensors["head.weight"].size)}


def plain(rate: float) -> Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]:
    return lambda parameters: torch.optim.SGD(parameters, lr=rate)


def adam(rate: float) -> Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]:
    return lambda parameters: torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)


def strategy(*, controls: bool) -> Strategy:
    return build(Parts(identity(), dense(), Method(rule("uniform")), sgd(1.0), controls=3 if controls else 0))


def federated(
    optimizer: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer],
    count: int,
    *,
    controls: bool,
    cohort: int = 3,
) -> np.ndarray:
    """Where the federation is after `count` rounds from zero."""
    plan, made = strategy(controls=controls), toys.plan(session=SESSION, cohort=cohort, rounds=count)
    transport = LocalTransport(3, lambda p: Site(p, toys.CONFIG, plan, Parabola(p, optimizer)), Kept())
    start = plan.init(toys.RUN, 0, AdapterState(SPEC, {"head.weight": np.zeros(2, np.float32)}))
    state = start
    for _ in range(count):
        state, _ = rounds.step(plan, made, state, transport, toys.nobody())
    return state.adapter.tensors["head.weight"]


def test_sgd_with_control_variates_finds_the_optimum_that_averaging_misses() -> None:
    found = federated(plain(0.1), 150, controls=True)
    missed = federated(plain(0.1), 150, controls=False)
    np.testing.assert_allclose(found, OPTIMUM, atol=1e-3)
    assert np.abs(missed - OPTIMUM).max() > 0.2


def test_it_finds_it_with_clients_that_take_turns() -> None:
    found = federated(plain(0.1), 600, controls=True, cohort=2)
    np.testing.assert_allclose(found, OPTIMUM, atol=1e-2)


def test_under_adam_the_optimum_is_where_it_stays() -> None:
    found = federated(adam(0.01), 400, controls=True)
    missed = federated(adam(0.01), 400, controls=False)
    assert np.abs(found - OPTIMUM).max() < 0.25 * np.abs(missed - OPTIMUM).max()
    plan = strategy(controls=True)
    at_optimum = AdapterState(SPEC, {"head.weight": OPTIMUM.astype(np.float32)})
    store = Kept()
    for p in range(3):  # what clients know once the federation has settled: their own gradient at the optimum
        own = (CURVATURES[p] * (OPTIMUM - TARGETS[p])).astype(np.float32)
        store.save(toys.RUN, p, 0, Memory({"control/head.weight": own}, {"position": 0}))
    transport = LocalTransport(3, lambda p: Site(p, toys.CONFIG, plan, Parabola(p, adam(0.01))), store)
    state, _ = rounds.step(
        plan, toys.plan(session=SESSION, cohort=3), plan.init(toys.RUN, 0, at_optimum), transport, toys.nobody()
    )
    # Adam takes the sign of a gradient that is zero but for rounding, so a step of its rate is what it may be off.
    assert np.abs(state.adapter.tensors["head.weight"] - OPTIMUM).max() < 0.02


def test_under_sgd_a_control_variate_is_the_papers_option_two() -> None:
    rate, start = 0.1, np.zeros(2, np.float32)
    plan = strategy(controls=True)
    store = Kept()
    before = {p: np.array([0.3 * p, -0.2], np.float32) for p in range(3)}
    for p, value in before.items():
        store.save(toys.RUN, p, 0, Memory({"control/head.weight": value}, {"position": 0}))
    server = np.array([0.05, -0.4], np.float32)
    state = plan.init(toys.RUN, 0, AdapterState(SPEC, {"head.weight": start}))
    state = replace(state, control={"head.weight": server})
    ends = {}
    learners = {p: Parabola(p, plain(rate)) for p in range(3)}
    for p, learner in learners.items():
        job = FitJob(1, p, (), 0, {"head.weight": server - before[p]})
        ends[p] = learner.fit(state.adapter, job).after["head.weight"]
    transport = LocalTransport(3, lambda p: Site(p, toys.CONFIG, plan, learners[p]), store)
    after, _ = rounds.step(plan, toys.plan(session=SESSION, cohort=3), state, transport, toys.nobody())
    expected = {p: before[p] - server + (start - ends[p]) / (STEPS * rate) for p in range(3)}
    for p, value in expected.items():
        np.testing.assert_allclose(store.load(toys.RUN, p, 2).tensors["control/head.weight"], value, atol=2e-6)
    change = sum(expected[p] - before[p] for p in range(3)) / 3
    np.testing.assert_allclose(after.control["head.weight"], server + change, atol=2e-6)
