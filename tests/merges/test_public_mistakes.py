"""Mistakes seen in public code: each check holds here, and fails as soon as the mistake is planted."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fedpeft.adapters.ranks as adapter_ranks
import fedpeft.config.robust as robust_presets
from fedpeft import adaptation, client, laws, models, residual_layers, strategy, training
from fedpeft.adapter_folders import read_adapter_folder
from fedpeft.adapters import AdapterSpec, AdapterState, Factors, ModuleSpec, Tensors, absorbed, at_rank, at_ranks
from fedpeft.adapters import resized as leading
from fedpeft.client import FitJob
from fedpeft.codecs import dense
from fedpeft.config.adapters import Lora
from fedpeft.config.tasks import SequenceClassification
from fedpeft.config.training import TrainingConfig
from fedpeft.errors import AdapterError, PlanError, QuorumError
from fedpeft.merges import exactness, padded, products
from fedpeft.merges.robust import Coordinate, Judge, Verdict
from fedpeft.models import AdaptedModel, extract, install, save_adapter
from fedpeft.optimizers import sgd
from fedpeft.stages import Stage, alternate, freeze, identity
from fedpeft.tasks import Example, build_task
from fedpeft.training import TorchLearner
from fedpeft.updates import ServerState, Update
from tests import tiny
from tests.merges.harness import (
    HEAD,
    REFERENCES,
    RUN,
    Federation,
    Layer,
    Round,
    assert_near,
    bits,
    cut,
    does,
    federation,
    low_rank,
    method_of,
    product,
    round_of,
    spec_of,
    strategy_of,
)

pytestmark = pytest.mark.usefixtures("one_thread")

Check = Callable[[], None]

LAYERS = [Layer(6, 5, 3), Layer(3, 4, 3), Layer(5, 5, 2)]
MIXED = (3, 1, 2)


@pytest.fixture
def caught(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`caught(check, target, name, wrong)`: the check holds, and fails while `target.name` is `wrong`."""

    def hold_and_fail(check: Check, target: Any, name: str, wrong: Any) -> None:
        check()
        with monkeypatch.context() as planted:
            planted.setattr(target, name, wrong)
            with pytest.raises(AssertionError):
                check()

    return hold_and_fail


def assert_as_dense(found: Round) -> None:
    """What the round applies is what the preset's dense reference says."""
    assert_near(found.applied(), REFERENCES[found.name].applied(found), found.scale())


# Alpha over rank.


def loaded(folder: Path, **settings: Any) -> AdaptedModel:
    """A tiny model whose adapter does something."""
    adapted = tiny.load(folder, Lora(target_modules=("query", "dense"), **settings))
    install(adapted, tiny.moved(adapted.initial, settings["rank"]))
    return adapted


def computed(adapted: AdaptedModel) -> dict[str, np.ndarray]:
    """What peft's layers add to each weight."""
    layers: dict[str, Any] = {
        module.path: adapted.model.get_submodule(f"{adapted.family.prefix}{module.path}")
        for module in low_rank(adapted.spec)
    }
    return {path: layer.get_delta_weight("default").detach().double().numpy() for path, layer in layers.items()}


def stacked(server: AdaptedModel, clients: Sequence[AdaptedModel]) -> AdapterState:
    """The server's adapter after the clients' adapters were stacked, all of one weight."""
    updates = []
    for adapted in clients:
        state = extract(adapted)
        spec = at_ranks(server.spec, {module.path: module.rank for module in state.spec.modules})
        received = leading(server.initial.tensors, spec)
        updates.append(Update(spec, {key: state.tensors[key] - received[key] for key in received}, 1, 1))
    start = ServerState(RUN, 0, 0, server.initial)
    return strategy_of(method_of("flora")).aggregate(start, iter(updates))[0].adapter


def assert_mean_of_layers(server: AdaptedModel, clients: Sequence[AdaptedModel]) -> None:
    changes = [computed(adapted) for adapted in clients]
    expected = {path: np.mean([one[path] for one in changes], axis=0) for path in changes[0]}
    found = does(stacked(server, clients))
    assert_near(found, expected, {path: float(np.linalg.norm(value)) for path, value in expected.items()})


def test_alpha_over_rank_is_in_the_stack(tiny_model: Path, caught: Callable[..., None]) -> None:
    server = tiny.load(tiny_model, Lora(rank=4, alpha=4.0, target_modules=("query", "dense")))
    clients = [loaded(tiny_model, rank=2, alpha=8.0), loaded(tiny_model, rank=4, alpha=2.0)]

    def without_scale(value: Any, scale: float) -> np.ndarray:
        return np.array(value.detach().numpy())

    caught(lambda: assert_mean_of_layers(server, clients), models, "_copied", without_scale)


def test_alpha_is_over_each_clients_own_rank(tiny_model: Path, caught: Callable[..., None]) -> None:
    # All have alpha 8, so that a scale of alpha over the server's rank is right for one of them.
    server = tiny.load(tiny_model, Lora(rank=4, alpha=8.0, target_modules=("query", "dense")))
    scales = adaptation._scales

    def check() -> None:
        assert_mean_of_layers(server, [loaded(tiny_model, rank=rank, alpha=8.0) for rank in (2, 4)])

    caught(check, adaptation, "_scales", lambda model, family: dict.fromkeys(scales(model, family), 8.0 / 4))


def test_alpha_follows_the_rank_that_is_exported(tiny_model: Path, tmp_path: Path, caught: Callable[..., None]) -> None:
    server = tiny.load(tiny_model, Lora(rank=4, alpha=8.0, target_modules=("query", "dense")))
    whole = absorbed(stacked(server, [loaded(tiny_model, rank=rank, alpha=8.0) for rank in (2, 4)]))

    def check() -> None:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        save_adapter(server, whole, folder)
        found, expected = does(read_adapter_folder(folder).state), does(whole)
        assert_near(found, expected, {path: float(np.linalg.norm(value)) for path, value in expected.items()})

    @contextlib.contextmanager
    def with_alpha_as_it_was(model: Any, spec: AdapterSpec) -> Iterator[None]:
        config = model.peft_config["default"]
        before, config.r = config.r, max(module.rank for module in spec.modules)
        yield
        config.r = before

    caught(check, residual_layers, "described", with_alpha_as_it_was)


# Singular values.


def by_svd(spread: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]], *, turned: bool) -> Any:
    """A truncation by dense SVD, of the transpose if `turned`; `spread(S)` is what B and A take of S."""

    def truncate(whole: Factors, rank: int) -> products.Truncated:
        value = whole.b @ whole.a
        u, s, vt = np.linalg.svd(value.T if turned else value, full_matrices=False)
        left, right = spread(s[:rank])
        found = Factors(u[:, :rank] * left, right[:, None] * vt[:rank])
        return products.Truncated(found, products.spectrum(whole, rank))

    return truncate


def halves(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.sqrt(values), np.sqrt(values)


SQUARE = [Layer(5, 5, 2), Layer(4, 4, 4)]


def test_the_svd_is_of_the_weight_and_not_of_its_transpose(caught: Callable[..., None]) -> None:
    caught(
        lambda: assert_as_dense(round_of("flexlora", SQUARE, (4, 1, 2))),
        products,
        "truncate",
        by_svd(halves, turned=True),
    )


@pytest.mark.parametrize("layers", [SQUARE, LAYERS], ids=["square", "not square"])
@pytest.mark.parametrize(
    "spread",
    [lambda s: (np.sqrt(s), np.ones_like(s)), lambda s: (np.ones_like(s), np.sqrt(s)), lambda s: (s, s)],
    ids=["only B", "only A", "S on both"],
)
def test_both_factors_take_the_root_of_the_singular_values(
    layers: list[Layer], spread: Any, caught: Callable[..., None]
) -> None:
    caught(
        lambda: assert_as_dense(round_of("flexlora", layers, MIXED)), products, "truncate", by_svd(spread, turned=False)
    )


def test_a_truncation_by_dense_svd_is_as_good(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that what is caught above is the mistake, and not the way in which it was planted."""
    monkeypatch.setattr(products, "truncate", by_svd(halves, turned=False))
    assert_as_dense(round_of("flexlora", LAYERS, MIXED))


# Clients that count for nothing.


def test_no_client_after_the_first_is_dropped_from_a_stack(caught: Callable[..., None]) -> None:
    add = exactness.add

    def only_the_first(target: exactness.Target, *more: Any) -> exactness.Target:
        return replace(add(target, *more), sums=target.sums) if target.sums else add(target, *more)

    for name in ("flora", "fedex", "flexlora"):
        found = round_of(name, LAYERS, MIXED)
        caught(lambda found=found: assert_as_dense(found), exactness, "add", only_the_first)


def test_no_client_after_the_first_is_dropped_from_a_mean(caught: Callable[..., None]) -> None:
    add = padded.add

    def only_the_first(sums: padded.Sums, delta: Tensors, weight: float) -> padded.Sums:
        return sums if any(held.any() for held in sums.covered.values()) else add(sums, delta, weight)

    for name in ("fedavg", "zero_pad", "ffa_lora", "rolora", "fed_sb", "lora_fair"):
        found = round_of(name, LAYERS, MIXED)
        caught(lambda found=found: assert_as_dense(found), padded, "add", only_the_first)


# One client's B in the next client's model.


TEXTS = tuple(Example((2, 5 + at, 6 + at, 3), at % 3, "") for at in range(8))
TASK = build_task(SequenceClassification(labels=tiny.LABELS, max_tokens=16))


def trained_by(name: str, adapted: Sequence[AdaptedModel], rounds: int = 2) -> Federation:
    """A run in which client k trains `adapted[k]`, on texts of its own."""
    plan = strategy_of(method_of(name))
    settings = TrainingConfig(steps=1, batch_size=2, learning_rate=0.05)
    learners = {
        partition: TorchLearner(model, TASK, TEXTS[3 * partition : 3 * partition + 4], settings, 0, rounds, 8)
        for partition, model in enumerate(adapted)
    }
    run = Federation(plan, learners, plan.init(RUN, 0, adapted[0].initial))
    for _ in range(rounds):
        run.step()
    return run


@pytest.mark.parametrize("name", ["fedavg", "fedsa_lora"])
def test_no_client_finds_anothers_b_in_a_shared_model(name: str, tiny_model: Path, caught: Callable[..., None]) -> None:
    def loaded_now() -> AdaptedModel:
        return tiny.load(tiny_model, Lora(rank=2, alpha=4.0))

    def check() -> None:
        alone, shared = trained_by(name, [loaded_now(), loaded_now()]), trained_by(name, [loaded_now()] * 2)
        assert bits(shared.state.adapter.tensors) == bits(alone.state.adapter.tensors)
        for partition in alone.learners:
            assert bits(shared.memories[partition].tensors) == bits(alone.memories[partition].tensors)

    def leaving_b(adapted: AdaptedModel, state: AdapterState) -> None:
        held = extract(adapted).tensors
        install(
            adapted, replace(state, tensors={k: held[k] if k.endswith(".B") else v for k, v in state.tensors.items()})
        )

    caught(check, training, "install", leaving_b)


# Alternating, and freezing.


def test_the_first_round_of_an_alternating_scheme_trains_what_has_a_gradient(caught: Callable[..., None]) -> None:
    def check() -> None:
        run = federation("rolora", LAYERS)
        run.step()
        for module in low_rank(run.state.adapter.spec):
            assert np.abs(product(run.state.adapter.tensors, module.path)).max() > 1e-3

    def a_first(odd: Sequence[str], even: Sequence[str]) -> Stage:
        return alternate(even, odd)

    caught(check, strategy, "alternate", a_first)


def assert_a_stays(name: str = "ffa_lora") -> None:
    """A is the same on the server, and on the clients before and after training; B is not."""
    run = federation(name, LAYERS)
    start = {key: value for key, value in run.state.adapter.tensors.items() if key.endswith(".A")}
    for round_ in range(1, 4):
        run.step()
        for tensors in (run.state.adapter.tensors, *(one.made[round_] for one in run.learners.values())):
            assert bits({key: tensors[key] for key in start}) == bits(start)
            assert all(np.abs(tensors[key[:-1] + "B"]).max() > 0 for key in start)


def test_what_is_frozen_is_found_in_the_adapter_that_there_is(caught: Callable[..., None]) -> None:
    def before_it_exists(patterns: Sequence[str]) -> Stage:
        return identity()._replace(frozen=lambda spec, round_: ())

    caught(assert_a_stays, strategy, "freeze", before_it_exists)
    bare = AdapterSpec("base", "lora", (ModuleSpec("head", "full", 0, 1.0, (("weight", (1,)),)),))
    with pytest.raises(AdapterError, match="expected a match"):
        freeze(("*.A",)).frozen(bare, 1)


def test_what_is_frozen_is_not_trained_anyway(caught: Callable[..., None]) -> None:
    def told_nothing(**job: Any) -> FitJob:
        return FitJob(**{**job, "frozen": ()})

    caught(assert_a_stays, client, "FitJob", told_nothing)


# Who takes part, and at which rank.


def test_a_stack_is_as_wide_as_those_that_came(caught: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    clients, rank = 4, 2
    everyone = round_of("flora", [Layer(12, 10, rank)], [rank] * clients)

    def check() -> None:
        for came in (1, 2, 3):
            found = everyone.with_updates(everyone.updates[:came])
            try:
                assert_as_dense(found)
            except ValueError as error:
                raise AssertionError(f"a round of {came} of {clients} clients fails") from error

    product_of = exactness.Sum.product

    def planned(total: exactness.Sum, *more: Any) -> Factors:
        whole = product_of(total, *more)
        return Factors(whole.b.reshape(-1, clients * rank), whole.a.reshape(clients * rank, -1))

    caught(check, exactness.Sum, "product", planned)
    monkeypatch.setattr(exactness.Sum, "product", planned)
    assert_as_dense(everyone)


ALIKE_IN_LENGTH = [Layer(4, 6, 4), Layer(6, 4, 4), Layer(4, 4, 4)]


@pytest.mark.parametrize("first_only", [True, False])
def test_the_rank_axis_is_known_by_name(first_only: bool, caught: Callable[..., None]) -> None:
    spec = round_of("flora", ALIKE_IN_LENGTH, [1]).spec

    def check() -> None:
        for rank in (1, 2, 3):
            assert at_rank(spec, rank).shapes == cut(spec, rank).shapes
        for name in ("flora", "zero_pad", "flexlora"):
            assert_as_dense(round_of(name, ALIKE_IN_LENGTH, (4, 1, 2)))

    def by_length(module: ModuleSpec, rank: int) -> ModuleSpec:
        shapes = []
        for name, shape in module.shapes:
            matching = [axis for axis, size in enumerate(shape) if size == module.rank][: 1 if first_only else None]
            shapes.append((name, tuple(rank if axis in matching else size for axis, size in enumerate(shape))))
        return replace(module, rank=rank, shapes=tuple(shapes)) if module.rank else module

    caught(check, adapter_ranks, "_at", by_length)


@pytest.mark.parametrize(
    "name", ["fedavg", "flora", "fedex", "flexlora", "ffa_lora", "rolora", "fedsa_lora", "hetlora"]
)
def test_heads_are_aggregated(name: str, caught: Callable[..., None]) -> None:
    found = round_of(name, LAYERS, MIXED)
    begin = padded.begin

    def check() -> None:
        after = found.aggregated()[0].adapter.tensors
        heads = {key: after[key].astype(np.float64) for key in HEAD}
        assert_near(heads, REFERENCES[name].heads(found), dict.fromkeys(HEAD, 1.0))

    def of_factors_alone(shapes: dict[str, tuple[int, ...]]) -> padded.Sums:
        return begin({key: shape for key, shape in shapes.items() if key.endswith((".A", ".B"))})

    caught(check, padded, "begin", of_factors_alone)


# Robust rules in small cohorts.

FACTORIES = {
    "median": "coordinate_median",
    "trimmed_mean": "trimmed_mean",
    "krum": "krum",
    "multi_krum": "multi_krum",
    "bulyan": "bulyan_selection",
    "geometric_median": "geometric_median",
}
"""What each robust preset takes its rule from."""


def quiet_judge(*settings: int) -> Judge:
    """A judge that finds nobody guilty."""
    return Judge(1, lambda gram, weights: Verdict(weights / weights.sum(), np.ones(len(weights))))


def quiet_mean(*settings: int) -> Coordinate:
    """A plain mean in the place of a coordinate rule."""
    return Coordinate(1, lambda values: values.astype(np.float64).mean(axis=0))


QUIET = {"coordinate_median": quiet_mean, "trimmed_mean": quiet_mean}


def assert_fires(name: str) -> None:
    """One attacker among three to nine clients, or as many as the rule needs, moves no head out of the honest ones."""
    fewest = max(3, method_of(name).merge.least)
    assert fewest < 10
    for clients in range(fewest, 10):
        found = round_of(name, [Layer(4, 3, 2)], [2] * clients, seed=clients, weights="uniform")
        attack = {key: np.full_like(value, 1e4) for key, value in found.updates[0].delta.items()}
        hostile = found.with_updates([replace(found.updates[0], delta=attack), *found.updates[1:]])
        before, after = found.state.adapter.tensors, hostile.aggregated()[0].adapter.tensors
        for key in HEAD:
            honest = [before[key] + update.delta[key] for update in found.updates[1:]]
            slack = 1e-3 * np.abs(honest).max()
            assert np.all(after[key] >= np.min(honest, axis=0) - slack), f"{name} with {clients} clients"
            assert np.all(after[key] <= np.max(honest, axis=0) + slack), f"{name} with {clients} clients"


@pytest.mark.parametrize("name", sorted(FACTORIES.keys() - {"bulyan"}))
def test_a_robust_rule_fires_under_ten_clients(name: str, caught: Callable[..., None]) -> None:
    factory = FACTORIES[name]
    caught(lambda: assert_fires(name), robust_presets, factory, QUIET.get(factory, quiet_judge))


def test_bulyans_two_phases_fire_under_ten_clients(caught: Callable[..., None]) -> None:
    # Each of them keeps one attacker out.
    blind = quiet_judge()._replace(least_clients=7)

    def without_the_first() -> None:
        with pytest.MonkeyPatch.context() as planted:
            planted.setattr(robust_presets, "bulyan_selection", lambda byzantine: blind)
            assert_fires("bulyan")

    def without_the_second() -> None:
        with pytest.MonkeyPatch.context() as planted:
            planted.setattr(robust_presets, "bulyan_mean", quiet_mean)
            assert_fires("bulyan")

    caught(without_the_first, robust_presets, "bulyan_mean", quiet_mean)
    caught(without_the_second, robust_presets, "bulyan_selection", lambda byzantine: blind)


def test_a_trimmed_mean_counts_clients_and_not_a_tenth_of_them(caught: Callable[..., None]) -> None:
    def a_tenth(trimmed: int) -> Coordinate:
        def combine(values: np.ndarray) -> np.ndarray:
            cut_off = int(0.1 * len(values))
            found: np.ndarray = np.sort(values, axis=0)[cut_off : len(values) - cut_off].mean(axis=0)
            return found

        return Coordinate(1, combine)

    caught(lambda: assert_fires("trimmed_mean"), robust_presets, "trimmed_mean", a_tenth)


NEEDING = ("krum", "multi_krum", "bulyan", "trimmed_mean")


@pytest.mark.parametrize("name", NEEDING)
def test_a_robust_rule_with_too_few_clients_is_no_quiet_mean(name: str, caught: Callable[..., None]) -> None:
    too_few = method_of(name).merge.least - 1

    def check() -> None:
        try:
            round_of(name, LAYERS, [3] * too_few).aggregated()
        except QuorumError:
            return
        raise AssertionError(f"{name} took {too_few} updates")

    factory = FACTORIES[name]
    caught(check, robust_presets, factory, QUIET.get(factory, quiet_judge))


@pytest.mark.parametrize("name", NEEDING)
def test_a_plan_with_too_few_clients_for_its_rule_is_refused(name: str, caught: Callable[..., None]) -> None:
    method, spec = method_of(name), spec_of(LAYERS)
    plan = strategy.Parts(identity(), dense(), method, sgd(1.0))

    def check() -> None:
        laws.check(plan, spec, updates=method.merge.least)
        try:
            laws.check(plan, spec, updates=method.merge.least - 1)
        except PlanError:
            return
        raise AssertionError(f"{name} may run with {method.merge.least - 1} updates")

    caught(check, laws, "LAWS", tuple(law for law in laws.LAWS if "robust" not in law.name))
