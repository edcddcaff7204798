"""Intervals hold what they should as often as they say, and bounds of ε are below what is known to be true."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from simulations.privacy import figures
from simulations.privacy.figures import Rates


def test_the_exact_interval_of_a_rate_is_that_of_the_tables() -> None:
    # Of 20 with 3 hits, at 95 %: 3.207 % to 37.893 %.
    found = figures.rate(3, 20)
    assert found.value == 0.15
    assert found.low == pytest.approx(0.03207, abs=1e-5)
    assert found.high == pytest.approx(0.37893, abs=1e-5)


def test_a_rate_of_none_or_all_has_an_end_that_is_certain() -> None:
    assert figures.rate(0, 10).low == 0.0
    assert figures.rate(10, 10).high == 1.0
    assert figures.rate(0, 10).high == pytest.approx(1 - 0.025**0.1)
    assert figures.rate(0, 0)[1:] == (0.0, 1.0)


@pytest.mark.parametrize("truth", [0.02, 0.3])
def test_intervals_of_rates_hold_the_truth_at_least_as_often_as_they_say(truth: float) -> None:
    random = np.random.default_rng(1)
    intervals = [figures.rate(int(hits), 60) for hits in random.binomial(60, truth, 400)]
    assert np.mean([found.low <= truth <= found.high for found in intervals]) >= 0.95


def test_the_area_under_the_curve_counts_equal_scores_half() -> None:
    # Pairs: 3 > 1, 3 > 2, 2 > 1 and 2 = 2, so 3.5 of 4.
    assert figures.auc(np.array([3.0, 2.0]), np.array([1.0, 2.0])).value == 3.5 / 4


def test_random_guesses_have_an_area_of_a_half_within_the_interval() -> None:
    random = np.random.default_rng(2)
    held = 0
    for _ in range(200):
        found = figures.auc(random.standard_normal(40), random.standard_normal(80))
        held += found.low <= 0.5 <= found.high
    assert 0.9 <= held / 200 <= 0.99


def test_intervals_of_areas_hold_the_true_area_about_as_often_as_they_say() -> None:
    random, truth = np.random.default_rng(3), stats.norm.cdf(1.5 / math.sqrt(2))
    found = [figures.auc(1.5 + random.standard_normal(60), random.standard_normal(60)) for _ in range(200)]
    assert 0.9 <= np.mean([one.low <= truth <= one.high for one in found]) <= 0.99
    assert all(0 <= one.low <= one.high <= 1 for one in found)


def test_scores_that_tell_all_apart_have_an_area_of_one_and_a_lower_end_below() -> None:
    found = figures.auc(np.arange(10.0) + 10, np.arange(10.0))
    assert found.value == found.high == 1.0
    assert 0.6 < found.low < 1.0


def test_at_most_the_share_that_is_allowed_scores_above_a_threshold() -> None:
    others = np.arange(1000.0)
    threshold = figures.threshold_at(others, 0.01)
    assert (others > threshold).sum() == 10
    assert figures.threshold_at(np.zeros(1000), 0.01) == 0.0  # equal scores are not split
    assert figures.rates_above(np.array([995.0, 3.0]), others, threshold) == Rates(1, 2, 10, 1000)


def test_epsilon_of_known_rates_is_the_logarithm_of_what_their_intervals_leave() -> None:
    rates = Rates(600, 1000, 20, 1000)
    low, high = figures.rate(600, 1000).low, figures.rate(20, 1000).high
    assert figures.epsilon_of(rates, 0.0) == pytest.approx(math.log(low / high))
    assert figures.epsilon_of(rates, 1e-2) == pytest.approx(math.log((low - 1e-2) / high))


def test_epsilon_is_found_at_the_other_end_too() -> None:
    # Nobody is missed, though half of the others are taken for members: 1 − FPR over 1 − TPR says more.
    rates = Rates(1000, 1000, 500, 1000)
    assert figures.epsilon_of(rates, 0.0) > 4.0


def test_rates_that_prove_nothing_give_an_epsilon_of_zero() -> None:
    assert figures.epsilon_of(Rates(10, 100, 10, 100), 0.0) == 0.0
    assert figures.epsilon_of(Rates(0, 100, 0, 100), 1e-5) == 0.0


def randomised_response(epsilon: float, rows: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores of members and of others that are (ε, 0) private and no more: the bit of each row, turned by a coin."""
    random, truthful = np.random.default_rng(seed), math.exp(epsilon) / (1 + math.exp(epsilon))
    return (random.random(rows) < truthful).astype(float), (random.random(rows) >= truthful).astype(float)


def test_epsilon_of_a_mechanism_of_known_epsilon_is_near_it_and_seldom_above() -> None:
    found = [figures.epsilon_of_scores(*randomised_response(1.0, 800, seed), 0.0) for seed in range(40)]
    assert np.mean([one > 1.0 for one in found]) <= 0.1
    assert 0.5 < np.mean(found) < 1.0


def test_guesses_of_one_run_prove_nearly_the_epsilon_and_seldom_more() -> None:
    found = []
    for seed in range(40):
        members, others = randomised_response(1.0, 1000, seed)
        right = int(members.sum() + (1 - others).sum())
        found.append(figures.epsilon_of_guesses(right, 2000, 2000, 0.0))
    assert np.mean([one > 1.0 for one in found]) <= 0.1
    assert 0.75 < np.mean(found) < 1.0


def test_guesses_prove_less_where_delta_allows_more() -> None:
    sure = figures.epsilon_of_guesses(90, 100, 1000, 0.0)
    assert 1.0 < sure < math.log(9)
    assert figures.epsilon_of_guesses(90, 100, 1000, 1e-2) < sure
    assert figures.epsilon_of_guesses(50, 100, 1000, 0.0) == 0.0


def test_a_mean_lies_in_its_bootstrap_interval_and_of_one_value_is_that() -> None:
    values = np.random.default_rng(4).exponential(size=50)
    found = figures.mean(values)
    error = values.std() / math.sqrt(50)
    assert found.low < found.value == values.mean() < found.high
    assert 3 * error < found.high - found.low < 5 * error
    assert figures.mean(np.array([2.0])) == (2.0, 2.0, 2.0)
