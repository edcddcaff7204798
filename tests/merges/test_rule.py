from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.adapters import AdapterState, at_rank, resized
from fedpeft.errors import FederationError
from fedpeft.merges import WEIGHTS, Contribution, Merge, Merged, by_product_norm, rule, truncated, with_residual
from fedpeft.rounds import in_order
from fedpeft.strategy import sent
from fedpeft.updates import ServerState, Update
from fedpeft.wire import Failure
from tests.toys import SPEC, WIDE, counted, flat, numbers, state, update, wide_state

values = st.floats(-1e6, 1e6, width=32)
updates = st.builds(update, st.tuples(values, values, values), st.integers(1, 10**9), st.integers(1, 10**9))
rules = st.sampled_from(sorted(WEIGHTS))


def contribution(merge: Merge, held: ServerState, one: Update) -> Contribution:
    return Contribution(one, sent(held.adapter, one.spec), merge.weigh(one))


def merged(
    updates: Iterable[Update], weights: str = "examples", held: ServerState | None = None, **settings: Any
) -> Merged:
    merge, held = rule(weights, **settings), held or state(0, 0, 0)
    fold = merge.init(held, tuple(held.adapter.spec.shapes), ())
    for one in updates:
        fold = merge.add(fold, contribution(merge, held, one))
    return merge.finish(fold)


@given(updates, rules)
def test_one_client_in_is_the_same_out(one: Update, weights: str) -> None:
    delta = merged([one], weights).delta
    assert flat(delta) == flat(one.delta)
    assert {value.dtype for value in delta.values()} == {np.dtype(np.float32)}


@given(updates, st.integers(1, 6), rules)
def test_identical_clients_are_a_fixed_point(one: Update, count: int, weights: str) -> None:
    assert flat(merged([one] * count, weights).delta) == flat(one.delta)


@given(st.lists(updates, min_size=1, max_size=5), rules, st.randoms(use_true_random=False))
def test_order_of_arrival_changes_no_bit(found: list[Update], weights: str, random: Any) -> None:
    cohort = tuple(range(len(found)))
    arrivals = [(partition, Failure(str(partition))) for partition in cohort]
    random.shuffle(arrivals)
    partitions = [partition for partition, _ in in_order(arrivals, cohort)]
    after = merged([found[partition] for partition in partitions], weights)
    assert flat(after.delta) == flat(merged(found, weights).delta)


@given(st.lists(updates, min_size=1, max_size=5), rules)
def test_the_mean_lies_between_its_clients(found: list[Update], weights: str) -> None:
    delta = flat(merged(found, weights).delta)
    for at, value in enumerate(delta):
        column = [flat(one.delta)[at] for one in found]
        assert min(column) <= value <= max(column)


@given(st.lists(updates, min_size=1, max_size=4), rules)
def test_inputs_are_not_changed(found: list[Update], weights: str) -> None:
    before, held = [flat(one.delta) for one in found], state(1, 2, 3)
    merged(found, weights, held)
    assert [flat(one.delta) for one in found] == before
    assert flat(held.adapter.tensors) == [1, 2, 3]


def test_a_fold_goes_on_from_where_it_was_without_changing_it() -> None:
    merge, held = rule("examples"), state(0, 0, 0)
    fold = merge.add(merge.init(held, tuple(SPEC.shapes), ()), contribution(merge, held, update((1, 1, 1))))
    first = merge.finish(fold)
    merge.add(fold, contribution(merge, held, update((5, 5, 5))))
    again = merge.finish(fold)
    assert flat(again.delta) == flat(first.delta) == [1, 1, 1]
    assert again.measures == first.measures


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ("examples", [(3 * 1 + 1 * 5) / 4, (3 * 0 + 1 * 8) / 4, 2.0]),
        ("tokens", [(2 * 1 + 6 * 5) / 8, (2 * 0 + 6 * 8) / 8, 2.0]),
        ("uniform", [(1 + 5) / 2, (0 + 8) / 2, 2.0]),
    ],
)
def test_weights_by_hand(weights: str, expected: list[float]) -> None:
    pair = [update((1, 0, 2), examples=3, tokens=2), update((5, 8, 2), examples=1, tokens=6)]
    assert flat(merged(pair, weights).delta) == expected


def test_drift_is_the_distance_from_the_mean_over_its_norm() -> None:
    # Deltas 1 and 3 of equal weight: mean 2, each 1 away, so 1 / 2.
    assert merged([update((1, 0, 0)), update((3, 0, 0))]).measures["drift"] == pytest.approx(0.5)
    # 4 at weight 1 and 0 at weight 3: mean 1, variance (9 + 3 * 1) / 4 = 3.
    pair = [update((4, 0, 0), examples=1), update((0, 0, 0), examples=3)]
    assert merged(pair).measures["drift"] == pytest.approx(math.sqrt(3))
    assert merged([update((1, 2, 3))] * 3).measures["drift"] == pytest.approx(0.0, abs=1e-3)
    assert math.isnan(merged([update((1, 0, 0)), update((-1, 0, 0))]).measures["drift"])  # type: ignore[arg-type]


def test_nothing_to_merge_is_an_error() -> None:
    with pytest.raises(FederationError, match="at least one update"):
        merged([])


def test_only_the_tensors_that_are_sent_are_merged() -> None:
    merge, held = rule("uniform"), state(1, 2, 3)
    spec = SPEC.without(["head.*"])
    delta = {key: value for key, value in numbers(1, 2, 3).items() if key in spec.shapes}
    fold = merge.add(merge.init(held, tuple(spec.shapes), ()), contribution(merge, held, Update(spec, delta, 1, 1)))
    assert sorted(merge.finish(fold).delta) == ["layer.A", "layer.B"]


# What it says of itself.


def test_the_error_by_hand() -> None:
    # B A is 1 × 1 and 3 × 3: the exact mean is 5, that of the factors gives 2 × 2 = 4.
    measures: Mapping[str, Any] = merged([update((0, 1, 1)), update((0, 3, 3))]).measures
    assert measures["merge_error"] == pytest.approx(1 / 5)
    assert measures["merge_errors"] == {"layer": pytest.approx(1 / 5)}
    assert measures["effective_ranks"] == {"layer": pytest.approx(1.0)}
    assert (measures["tail"], measures["tails"]) == (0.0, {"layer": 0.0})


def test_the_exact_mean_is_of_what_clients_hold_not_of_what_they_moved() -> None:
    # From A = 2, B = 3: to 3 × 4 = 12 and to 1 × 2 = 2; the mean is 7, that of the factors 2 × 3 = 6.
    pair = [update((0, 1, 1)), update((0, -1, -1))]
    assert merged(pair, held=state(0, 2, 3)).measures["merge_error"] == pytest.approx(1 / 7)


def test_modules_whose_factor_stays_at_home_are_not_judged() -> None:
    merge, held = rule("examples"), wide_state()
    spec = WIDE.without(["left.B"])
    delta = {key: np.ones(shape, np.float32) for key, shape in spec.shapes.items()}
    fold = merge.init(held, tuple(spec.shapes), ("left.B",))
    fold = merge.add(fold, contribution(merge, held, Update(spec, delta, 1, 1)))
    assert list(merge.finish(fold).measures["merge_errors"]) == ["right"]  # type: ignore[arg-type]
    nothing = merge.init(held, ("head.weight",), ("left.B", "right.A"))
    one = Update(WIDE.only(["head.weight"]), {"head.weight": np.ones(1, np.float32)}, 1, 1)
    assert set(merge.finish(merge.add(nothing, contribution(merge, held, one))).measures) == {"drift"}


def test_traits_follow_from_what_a_rule_reads() -> None:
    plain, cut, weighed = rule("examples"), rule("examples", truncated), rule("examples", reweigh=by_product_norm)
    assert (plain.reads, plain.linear) == ("sum", True)
    assert (cut.reads, cut.linear) == (weighed.reads, weighed.linear) == ("each", False)
    named = rule("examples", with_residual(0), gauge="free", mixed=False, whole=True, drifts=True)
    assert (named.gauge, named.mixed, named.whole, named.drifts, named.least) == ("free", False, True, True, 1)


# Weights by what an adapter does.


def moved_to(*targets: tuple[float, float, float], examples: int = 1) -> list[Update]:
    """Updates that bring an adapter of zeros to these values."""
    return [update(target, examples) for target in targets]


def test_low_rank_tensors_weigh_by_their_product_and_others_by_what_they_came_with() -> None:
    # ‖B A‖ is 1 and 3: A and B are (1 × 1 + 3 × 3) / 4 and (1 × 1 + 3 × 1) / 4; the head is (4 + 8) / 2.
    delta = merged(moved_to((4, 1, 1), (8, 3, 1)), reweigh=by_product_norm).delta
    assert flat(delta) == [6.0, 2.5, 1.0]


def test_the_product_is_over_all_modules_at_the_clients_own_rank() -> None:
    held = wide_state()
    one = at_rank(WIDE, 2)
    delta = {key: np.zeros(shape, np.float32) for key, shape in one.shapes.items()}
    merge = rule("examples", reweigh=by_product_norm)
    found = by_product_norm(contribution(merge, held, Update(one, delta, 1, 1)), WIDE.modules[1:])
    small = resized(counted(), one)
    products = [small[f"{path}.B"].astype(float) @ small[f"{path}.A"] for path in ("left", "right")]
    assert found == pytest.approx(math.sqrt(sum(np.linalg.norm(product) ** 2 for product in products)))


def test_clients_whose_adapters_do_nothing_leave_the_low_rank_tensors_where_they_are() -> None:
    # All products are 0 before and after, so no client has a weight; the head is averaged all the same.
    measures = merged(moved_to((4, 0, 1), (8, 0, 3)), reweigh=by_product_norm, held=state(1, 0, 1))
    assert flat(measures.delta) == [6.0, 0.0, 0.0]


# Unlike ranks.


def drawn(rank: int, seed: int, spec: Any = WIDE) -> Update:
    random, own = np.random.default_rng(seed), at_rank(spec, rank)
    delta = {key: random.standard_normal(shape).astype(np.float32) for key, shape in own.shapes.items()}
    return Update(own, delta, seed + 1, 1)


@pytest.mark.parametrize("missing", ["zero", "covered"])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_unlike_ranks_against_the_definition(missing: str, order: tuple[int, ...]) -> None:
    held, found = wide_state(), [drawn(rank, seed) for seed, rank in enumerate((1, 3, 4))]
    result = merged([found[at] for at in order], held=held, missing=missing)
    for key, shape in WIDE.shapes.items():
        before = held.adapter.tensors[key].astype(float)
        total, weight = np.zeros(shape), np.zeros(shape)
        for one in found:
            at = tuple(slice(size) for size in one.spec.shapes[key])
            total[at] += one.examples * (before[at] + one.delta[key])
            weight[at] += one.examples
        ranked = not key.startswith("head")
        share = 6.0 if missing == "zero" and ranked else weight
        np.testing.assert_allclose(before + result.delta[key], total / share, rtol=1e-5, err_msg=key)


def test_a_head_is_averaged_over_those_that_have_one_whatever_counts_for_ranks() -> None:
    spec = WIDE.without(["head.*"])
    headless = Update(spec, {key: np.zeros(shape, np.float32) for key, shape in spec.shapes.items()}, 3, 1)
    one = drawn(4, 0)
    for missing in ("zero", "covered"):
        delta = merged([one, headless], held=wide_state(), missing=missing).delta
        assert flat({"h": delta["head.weight"]}) == pytest.approx(flat({"h": one.delta["head.weight"]}))


def test_the_exact_mean_of_unlike_ranks_is_what_the_error_is_against() -> None:
    held, found = wide_state(), [drawn(rank, seed) for seed, rank in enumerate((1, 3, 4))]
    result = merged(found, held=held)
    after = {key: held.adapter.tensors[key] + result.delta[key] for key in WIDE.shapes}
    errors: Any = result.measures["merge_errors"]
    for path in ("left", "right"):
        exact = np.zeros((after[f"{path}.B"].shape[0], after[f"{path}.A"].shape[1]))
        for one in found:
            own = resized(held.adapter.tensors, one.spec)
            b, a = ((own[f"{path}.{name}"].astype(float) + one.delta[f"{path}.{name}"]) for name in ("B", "A"))
            exact += one.examples / 6 * b @ a
        gap = after[f"{path}.B"].astype(float) @ after[f"{path}.A"] - exact
        assert errors[path] == pytest.approx(np.linalg.norm(gap) / np.linalg.norm(exact), rel=1e-5)


def test_the_adapter_that_a_client_received_may_hold_more_than_it_sends() -> None:
    # B alone travels; A was 2 at both: products 2 × 5 and 2 × 1, mean 6, which is what the mean of B gives.
    merge, held = rule("examples"), state(0, 2, 3)
    spec = SPEC.only(["layer.B"])
    fold = merge.init(held, tuple(spec.shapes), ())
    for by in (2.0, -2.0):
        one = Update(spec, {"layer.B": np.full((1, 1), by, np.float32)}, 1, 1)
        fold = merge.add(fold, Contribution(one, AdapterState(SPEC, numbers(0, 2, 3)), 1.0))
    found = merge.finish(fold)
    assert flat(found.delta) == [0.0]
    assert found.measures["merge_error"] == pytest.approx(0.0, abs=1e-12)
