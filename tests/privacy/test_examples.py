from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fedpeft.batches import batches_from, by_coin, each_once
from fedpeft.errors import ConfigError
from fedpeft.privacy.entropy import SOURCES
from fedpeft.privacy.examples import Cost, ExamplePrivacy, cost, expected_examples, poisson, released, sampling_rate
from fedpeft.tasks import Example

PRIVACY = ExamplePrivacy(clip_norm=2.0, noise_multiplier=0.5)


@pytest.mark.parametrize("source", sorted(SOURCES))
def test_sizes_of_poisson_samples_follow_the_binomial_law(source: str) -> None:
    rows, rate, draws = 40, 0.2, 4000
    draw = SOURCES[source](0, "coins")
    sizes = np.array([len(poisson(draw, rows, rate)) for _ in range(draws)])
    expected = stats.binom(rows, rate)
    edges = np.arange(3, 15)
    cells = np.concatenate([[expected.cdf(2)], expected.pmf(edges), [expected.sf(14)]])
    seen = np.concatenate([[(sizes <= 2).sum()], [(sizes == edge).sum() for edge in edges], [(sizes > 14).sum()]])
    assert stats.chisquare(seen, cells * draws).pvalue > 1e-5


def test_examples_are_drawn_independently_each_as_often() -> None:
    rows, rate, draws = 8, 0.3, 6000
    draw = SOURCES["os"](0, "coins")
    taken = np.zeros((draws, rows))
    for at in range(draws):
        taken[at, poisson(draw, rows, rate)] = 1
    bound = 5 / np.sqrt(draws)
    assert (np.abs(taken.mean(0) - rate) < bound).all()
    others = np.corrcoef(taken.T)[~np.eye(rows, dtype=bool)]
    assert (np.abs(others) < bound).all()
    assert abs(np.corrcoef(taken[1:, 0], taken[:-1, 0])[0, 1]) < bound


@given(st.integers(1, 500), st.integers(1, 64))
def test_what_a_step_draws_is_what_it_is_divided_by(rows: int, batch: int) -> None:
    rate = sampling_rate(rows, batch)
    assert 0 < rate <= 1
    assert rate * rows == pytest.approx(expected_examples(rows, batch))


def test_a_cost_is_of_every_step_and_amplified_only_where_coins_were_thrown() -> None:
    assert cost(PRIVACY, rows=200, batch=16, steps=30) == Cost(0.08, 0.5, 30)
    assert cost(PRIVACY, rows=10, batch=16, steps=30) == Cost(1.0, 0.5, 30)
    shuffled = ExamplePrivacy(2.0, 0.5, sampler="shuffled")
    assert cost(shuffled, rows=200, batch=16, steps=30) == Cost(1.0, 0.5, 30)


def test_what_is_released_by_hand() -> None:
    sums = {"b": np.array([1.0, 2.0]), "a": np.array(4.0)}
    numbers = iter([0.75, 0.75, 0.0, 0.25])
    found = released(sums, PRIVACY, 4.0, lambda count: np.array([next(numbers) for _ in range(count)]))
    # √(−2 ln(1 − 0.75)) = 1.6651 times the cosines and then the sines of 0 and of a right angle: 1.6651, 0, 0, 1.6651.
    assert found["a"] == pytest.approx((4.0 + 0.5 * 2.0 * 1.6651) / 4, abs=1e-4)
    np.testing.assert_allclose(found["b"], sums["b"] / 4, atol=1e-12)
    assert {value.dtype for value in found.values()} == {np.dtype(np.float64)}


@pytest.mark.parametrize(
    ("fields", "key"),
    [
        ({"clip_norm": 0.0}, "clip_norm"),
        ({"clip_norm": float("inf")}, "clip_norm"),
        ({"noise_multiplier": -1.0}, "noise_multiplier"),
        ({"noise_multiplier": float("nan")}, "noise_multiplier"),
        ({"sampler": "fixed"}, "sampler"),
        ({"entropy": "torch"}, "entropy"),
    ],
)
def test_a_field_out_of_range_is_refused(fields: dict[str, object], key: str) -> None:
    with pytest.raises(ConfigError, match=f"example privacy, {key}: expected"):
        ExamplePrivacy(**{"clip_norm": 1.0, "noise_multiplier": 1.0, **fields})  # type: ignore[arg-type]


def some(count: int) -> tuple[Example, ...]:
    return tuple(Example((7,) * (1 + at % 4), 0, "") for at in range(count))


@given(st.integers(1, 30), st.integers(1, 9), st.integers(1, 6), st.integers(0, 10))
def test_no_example_is_in_one_step_twice(count: int, batch_size: int, accumulation: int, position: int) -> None:
    examples = some(count)
    stream = each_once(batches_from(examples, batch_size, 0, 0, position), accumulation)
    for step in islice(stream, 5):
        assert 0 < len(step) == len({id(example) for example in step}) <= batch_size * accumulation


def test_steps_by_coin_go_on_though_one_has_no_example() -> None:
    found = list(islice(by_coin(some(3), 0.1, SOURCES["seed"](0, "coins")), 40))
    assert not all(found)
    assert any(found)
    assert all([one.size for one in step] == sorted((one.size for one in step), reverse=True) for step in found)
    assert [len(step) for step in islice(by_coin(some(3), 1.0, SOURCES["os"](0)), 3)] == [3, 3, 3]
