from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fedpeft import residuals
from fedpeft.adapters import AdapterState, Factors, at_rank, resized
from fedpeft.errors import FederationError, FedPeftError
from fedpeft.merges import Merged, Method, Pruning, rule
from fedpeft.optimizers import momentum
from fedpeft.stages import alternate, chain, clip, freeze, identity, keep_local
from fedpeft.strategy import Strategy, build, sent, stage_of
from fedpeft.updates import Update
from tests.toys import RUN, SPEC, WIDE, counted, flat, numbers, parts, state, strategy, update, wide_state


def test_aggregate_by_hand() -> None:
    # Deltas (2, 0, 4) and (6, 4, 0) at weights 1 and 3: mean (5, 3, 1); half of it is added to (1, 1, 1).
    before = state(1, 1, 1, progress={"best": 0.5})
    after, measures = strategy(rate=0.5).aggregate(before, iter([update((2, 0, 4), 1), update((6, 4, 0), 3)]))
    assert flat(after.adapter.tensors) == [3.5, 2.5, 1.5]
    assert (after.round, after.run, after.progress) == (1, RUN, {"best": 0.5})
    assert measures["update_norm"] == pytest.approx(np.sqrt(35))
    assert flat(before.adapter.tensors) == [1, 1, 1]
    assert before.round == 0


def test_the_servers_half_of_a_stage_comes_before_the_optimiser() -> None:
    doubled = identity()._replace(server=lambda delta: {key: 2 * value for key, value in delta.items()})
    after, measures = strategy(doubled, rate=0.5).aggregate(state(1, 1, 1), [update((2, 0, 4))])
    assert flat(after.adapter.tensors) == [3, 1, 5]
    assert measures["update_norm"] == pytest.approx(np.sqrt(80))


def test_init_and_finalize_hold_the_adapter_as_it_is() -> None:
    first = strategy().init("r", 3, state(1, 2, 3).adapter)
    assert (first.run, first.round, first.seed, first.progress) == ("r", 0, 3, {})
    final = strategy().finalize(first)
    assert final.spec == SPEC
    assert flat(final.tensors) == [1, 2, 3]


def test_finalize_deploys_what_the_base_has_taken_up() -> None:
    random = np.random.default_rng(0)
    residual = {
        "left.A": random.standard_normal((2, 7)).astype(np.float32),
        "left.B": random.standard_normal((6, 2)).astype(np.float32),
    }
    held = wide_state(residual=residual)
    final = strategy().finalize(held)
    assert final.residual == {}
    assert [module.rank for module in final.spec.modules] == [0, 6, 4]
    change = final.tensors["left.B"] @ final.tensors["left.A"]
    apart = counted()["left.B"] @ counted()["left.A"] + residual["left.B"] @ residual["left.A"]
    np.testing.assert_allclose(change, apart, rtol=1e-6)


def test_what_is_not_shared_does_not_move() -> None:
    plan = strategy(chain(freeze(["head.*"]), keep_local(["*.A"])))
    spec = plan.stage.shared(SPEC, 1)
    after, _ = plan.aggregate(state(1, 2, 3), [Update(spec, {"layer.B": numbers(9, 9, 9)["layer.B"]}, 1, 1)])
    assert flat(after.adapter.tensors) == [1, 2, 12]


def test_alternating_tensors_move_in_their_own_rounds() -> None:
    plan = build(parts(alternating=("*.B", "*.A")))
    held = state(1, 2, 3)
    for expected in ([2, 2, 4], [3, 3, 4], [4, 3, 5]):
        spec = plan.stage.shared(SPEC, held.round + 1)
        delta = {key: value for key, value in numbers(1, 1, 1).items() if key in spec.shapes}
        held, _ = plan.aggregate(held, [Update(spec, delta, 1, 1)])
        assert flat(held.adapter.tensors) == expected


def test_an_adapter_that_overflows_is_refused_before_it_reaches_the_state() -> None:
    huge = float(np.finfo(np.float32).max)
    with pytest.raises(FedPeftError, match=r"head\.weight: expected finite numbers, found NaN or infinity"):
        strategy().aggregate(state(huge, 0, 0), [update((huge, 0, 0))])


# Which tensors a method leaves untrained or at home, and in which rounds.


def test_a_method_and_the_settings_both_keep_tensors_back() -> None:
    plan = build(parts(freeze(["head.*"]), frozen=("*.A",)))
    assert plan.stage.frozen(SPEC, 1) == ("layer.A", "head.weight")
    assert list(plan.stage.shared(SPEC, 1).shapes) == ["layer.B"]


@pytest.mark.parametrize(
    ("method", "frozen", "local"),
    [
        ({}, [(), ()], ()),
        ({"frozen": ("*.A",)}, [("layer.A",)] * 2, ()),
        ({"local": ("*.B",)}, [(), ()], ("layer.B",)),
        ({"alternating": ("*.B", "*.A")}, [("layer.A",), ("layer.B",)], ()),
    ],
)
def test_the_stage_of_a_method(method: dict[str, Any], frozen: list[tuple[str, ...]], local: tuple[str, ...]) -> None:
    stage = stage_of(Method(rule("examples"), **method))
    assert [stage.frozen(SPEC, round_) for round_ in (1, 2)] == frozen
    assert [stage.local(SPEC, round_) for round_ in (1, 2)] == [local, local]


def test_the_optimiser_remembers_what_some_round_trains_and_no_more() -> None:
    kept = chain(freeze(["head.*"]), keep_local(["left.*"]))
    for stage, expected in (
        (kept, ["right.A", "right.B"]),
        (alternate(["*.A"], ["*.B"]), sorted(WIDE.shapes)),
    ):
        built = build(replace(parts(stage), optimizer=momentum(1.0, 0.9, "sum")))
        first = built.init(RUN, 0, wide_state().adapter)
        assert sorted(first.optimizer) == [f"first_moment/{key}" for key in expected]


# Unlike ranks.


def test_a_node_holds_the_leading_corner_of_what_the_server_has() -> None:
    like = at_rank(WIDE, 2).only(["left.B", "head.weight"])
    found = sent(wide_state(residual=resized(counted(), WIDE.only(["left.A", "left.B"]))).adapter, like)
    assert found.spec.modules[1] == at_rank(WIDE, 2).modules[1]
    assert found.spec.modules[2] == WIDE.modules[2]
    assert found.tensors["left.A"].tolist() == counted()["left.A"][:2].tolist()
    assert found.tensors["left.B"].tolist() == counted()["left.B"][:, :2].tolist()
    assert found.residual == {}


def test_an_update_of_lower_rank_is_merged_against_what_that_node_was_sent() -> None:
    seen: list[AdapterState] = []
    inner = rule("examples", missing="covered")

    def add(fold: object, contribution: object) -> object:
        seen.append(contribution.received)  # type: ignore[attr-defined]
        return inner.add(fold, contribution)  # type: ignore[arg-type]

    plan = build(parts(merge=inner._replace(add=add)))
    spec = at_rank(WIDE, 1)
    ones = {key: np.ones(shape, np.float32) for key, shape in spec.shapes.items()}
    after, _ = plan.aggregate(wide_state(), [Update(spec, ones, 1, 1)])
    assert seen[0].spec == spec
    assert flat(seen[0].tensors) == flat(resized(counted(), spec))
    moved = {key: after.adapter.tensors[key] - counted()[key] for key in WIDE.shapes}
    for key, value in moved.items():
        corner = value[tuple(slice(size) for size in spec.shapes[key])]
        assert np.all(corner == 1)
        assert value.sum() == corner.size


# What the base takes up.


def drifting(more: Callable[[int], Mapping[str, Factors]], budget: int = 0) -> Strategy:
    """Moves nothing, and gives the base the products `more(round)`."""
    plain = rule("examples")

    def finish(fold: Any) -> Merged:
        return replace(plain.finish(fold), residual=more(fold.state.round + 1))

    return build(parts(merge=plain._replace(finish=finish, drifts=True), budget=budget))


def ones(round_: int) -> Mapping[str, Factors]:
    """In round 1 ones × (1 0 ...), in round 2 twos × (1 1 0 ...), on `left`; always ones on `right`."""
    row = np.eye(1, 7) + (round_ - 1) * np.eye(1, 7, k=1)
    return {
        "left": Factors(np.full((6, 1), float(round_)), row),
        "right": Factors(np.ones((4, 1)), np.ones((1, 9))),
    }


def still() -> Update:
    return Update(WIDE, {key: np.zeros(shape, np.float32) for key, shape in WIDE.shapes.items()}, 1, 1)


def test_what_the_base_takes_up_is_appended_round_by_round() -> None:
    plan, held = drifting(ones), wide_state()
    for round_ in (1, 2):
        held, figures = plan.aggregate(held, [still()])
        assert residuals.ranks_of(held.adapter.residual) == (round_, round_)
        assert held.drift.ranks[round_] == (round_, round_)
        assert held.drift.epoch == 0
        assert figures["residual_rank"] == round_
        assert figures["residual_dropped"] == 0.0
    # Ones × (1 0 ...) + twos × (1 1 0 ...)
    product = held.adapter.residual["left.B"] @ held.adapter.residual["left.A"]
    assert product.tolist() == [[3, 2, 0, 0, 0, 0, 0]] * 6
    assert flat(held.adapter.tensors) == flat(counted())


def test_a_budget_bounds_the_rank_and_says_what_it_dropped() -> None:
    plan, held = drifting(ones, budget=1), wide_state()
    held, first = plan.aggregate(held, [still()])
    assert (first["residual_rank"], first["residual_dropped"], held.drift.epoch) == (1.0, 0.0, 0)
    # Ones × (1 0 ...) + twos × (1 1 0 ...) = ones × (3 2 0 ...) is of rank 1: nothing is lost, but all columns are new.
    held, second = plan.aggregate(held, [still()])
    assert second["residual_rank"] == 1.0
    assert second["residual_dropped"] == pytest.approx(0.0, abs=1e-6)
    assert (held.drift.epoch, held.drift.ranks) == (2, {2: (1, 1)})
    product = held.adapter.residual["left.B"] @ held.adapter.residual["left.A"]
    np.testing.assert_allclose(product, [[3, 2, 0, 0, 0, 0, 0]] * 6, atol=1e-5)


def test_a_residual_that_is_not_finite_is_refused_in_words() -> None:
    huge = {**ones(1), "left": Factors(np.full((6, 1), 1e39), np.ones((1, 7)))}
    with pytest.raises(FederationError, match=r"adapter after round 1, tensor left\.B: expected finite numbers"):
        drifting(lambda round_: huge).aggregate(wide_state(), [still()])


# Control variates.


def test_control_variates_start_at_zero_where_they_are_kept() -> None:
    adapter = wide_state().adapter
    assert build(parts()).init(RUN, 0, adapter).control == {}
    kept = build(replace(parts(chain(freeze(["head.*"]), keep_local(["left.B"]))), controls=3))
    control = kept.init(RUN, 0, adapter).control
    assert sorted(control) == ["left.A", "right.A", "right.B"]
    assert not any(np.any(value) for value in control.values())
    assert (kept.controls, build(parts()).controls) == (True, False)


def test_the_mean_control_variate_moves_by_each_clients_over_all_clients() -> None:
    # Two of four clients moved theirs by 8 and by 4: 1 + (8 + 4) / 4.
    plan = build(replace(parts(), controls=4))
    held = state(0, 0, 0, control=numbers(1, 1, 1))
    moved = [replace(update((1, 1, 1)), control=numbers(by, 0, by)) for by in (8, 4)]
    after, _ = plan.aggregate(held, moved)
    assert flat(after.control) == [4, 1, 4]
    assert flat(held.control) == [1, 1, 1]


def test_a_control_variate_that_overflows_is_refused_before_it_reaches_the_state() -> None:
    """Every client would add what is not finite to its gradients from then on."""
    huge = float(np.finfo(np.float32).max)
    plan = build(replace(parts(), controls=1))
    moved = [replace(update((0, 1, 1)), control=numbers(huge, 0, 0))] * 2
    with pytest.raises(FederationError, match=r"head\.weight: expected finite numbers, found NaN or infinity"):
        plan.aggregate(state(0, 0, 0, control=numbers(huge, 0, 0)), moved)


def test_a_strategy_tells_clients_how_to_prune() -> None:
    pruning = Pruning(0.5, 0.1)
    assert build(parts(pruning=pruning)).pruning == pruning
    assert build(parts(clip(1.0))).pruning is None
