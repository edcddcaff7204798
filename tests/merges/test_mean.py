import math
from collections.abc import Iterable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.errors import FederationError
from fedpeft.merges import WEIGHTS, Merged, mean
from fedpeft.rounds import in_order
from fedpeft.updates import Update
from fedpeft.wire import Failure
from tests.toys import SPEC, flat, numbers, update

values = st.floats(-1e6, 1e6, width=32)
updates = st.builds(update, st.tuples(values, values, values), st.integers(1, 10**9), st.integers(1, 10**9))
rules = st.sampled_from(sorted(WEIGHTS))


def merged(updates: Iterable[Update], weights: str = "examples") -> Merged:
    merge = mean(weights)
    fold = merge.init(SPEC)
    for one in updates:
        fold = merge.add(fold, one)
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
def test_order_of_arrival_changes_no_bit(found: list[Update], weights: str, random: object) -> None:
    cohort = tuple(range(len(found)))
    arrivals = [(partition, Failure(str(partition))) for partition in cohort]
    random.shuffle(arrivals)  # type: ignore[attr-defined]
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
    before = [flat(one.delta) for one in found]
    merged(found, weights)
    assert [flat(one.delta) for one in found] == before


def test_a_fold_goes_on_from_where_it_was_without_changing_it() -> None:
    merge = mean("examples")
    fold = merge.add(merge.init(SPEC), update((1, 1, 1)))
    merge.add(fold, update((5, 5, 5)))
    assert flat(merge.finish(fold).delta) == [1, 1, 1]


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
    assert math.isnan(merged([update((1, 0, 0)), update((-1, 0, 0))]).measures["drift"])


def test_nothing_to_merge_is_an_error() -> None:
    with pytest.raises(FederationError, match="at least one update"):
        merged([])


def test_only_the_tensors_of_the_specification_are_merged() -> None:
    merge = mean("uniform")
    spec = SPEC.without(["head.*"])
    delta = {key: value for key, value in numbers(1, 2, 3).items() if key in spec.shapes}
    fold = merge.add(merge.init(spec), Update(spec, delta, 1, 1))
    assert sorted(merge.finish(fold).delta) == ["layer.A", "layer.B"]
