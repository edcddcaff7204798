"""The account: dp_accounting used directly, published figures, and what each sampler may claim."""

from __future__ import annotations

import math
from dataclasses import replace

import dp_accounting as dp
import pytest
from dp_accounting import pld, rdp
from scipy.stats import norm

from fedpeft.errors import PlanError
from fedpeft.privacy import accountant, affordable, calibrated, epsilon
from fedpeft.updates import Spent

HUNDRED = Spent(0, "poisson", 1000, 0.05, 0.86)


def history(spent: Spent, rounds: int) -> tuple[Spent, ...]:
    return tuple(replace(spent, round=round_ + 1) for round_ in range(rounds))


def gaussian_delta(noise: float, found: float) -> float:
    """δ of a Gaussian at ε, exactly: Balle and Wang 2018, "Improving the Gaussian Mechanism", theorem 8."""
    return norm.cdf(0.5 / noise - found * noise) - math.exp(found) * norm.cdf(-0.5 / noise - found * noise)


@pytest.mark.parametrize(("noise", "target"), [(1.86, 1.0), (0.86, 4.0), (0.644, 8.0)])
def test_drawn_by_coins_the_account_is_that_of_the_library_and_of_the_published_figures(
    noise: float, target: float
) -> None:
    found = epsilon(history(replace(HUNDRED, noise_multiplier=noise), 100), 1e-4)
    direct = pld.PLDAccountant(dp.NeighboringRelation.ADD_OR_REMOVE_ONE)
    direct.compose(dp.PoissonSampledDpEvent(0.05, dp.GaussianDpEvent(noise)), 100)
    assert found == direct.get_epsilon(1e-4)
    assert found == pytest.approx(target, rel=0.005)


def test_the_distribution_of_a_round_is_worked_out_once_and_the_account_stays_the_library_s() -> None:
    accountant._subsampled.cache_clear()
    for rounds in range(1, 5):
        louder = history(replace(HUNDRED, noise_multiplier=1.31), 2)
        found = epsilon((*history(replace(HUNDRED, noise_multiplier=0.97), rounds), *louder), 1e-4)
        direct = pld.PLDAccountant(dp.NeighboringRelation.ADD_OR_REMOVE_ONE)
        direct.compose(dp.PoissonSampledDpEvent(0.05, dp.GaussianDpEvent(0.97)), rounds)
        direct.compose(dp.PoissonSampledDpEvent(0.05, dp.GaussianDpEvent(1.31)), 2)
        assert found == direct.get_epsilon(1e-4)
    assert accountant._subsampled.cache_info().misses == 2


@pytest.mark.parametrize("sampler", ["everyone", "reachable"])
def test_without_a_draw_rounds_compose_as_one_gaussian_does(sampler: str) -> None:
    found = epsilon(history(Spent(0, sampler, 50, 1.0, 5.82), 50), 1e-3)
    assert found == pytest.approx(4.0, rel=0.005)
    assert gaussian_delta(5.82 / math.sqrt(50), found) == pytest.approx(1e-3, rel=0.01)


def test_a_fixed_number_without_replacement_is_accounted_by_twice_the_reach_and_its_own_theorem() -> None:
    spent = Spent(0, "fixed", 1000, 0.05, 2.6)
    direct = rdp.RdpAccountant(neighboring_relation=dp.NeighboringRelation.REPLACE_ONE)
    direct.compose(dp.SampledWithoutReplacementDpEvent(1000, 50, dp.GaussianDpEvent(1.3)), 100)
    found = epsilon(history(spent, 100), 1e-4)
    assert found == direct.get_epsilon(1e-4)
    assert found > epsilon(history(replace(spent, sampler="poisson"), 100), 1e-4)


def test_whoever_is_reachable_is_not_claimed_to_be_drawn() -> None:
    spent = replace(HUNDRED, noise_multiplier=9.59)
    drawn, there = (epsilon(history(replace(spent, sampler=name), 100), 1e-4) for name in ("poisson", "reachable"))
    assert there == pytest.approx(4.0, rel=0.005)
    assert there > 10 * drawn


def test_clients_who_answer_for_themselves_pay_for_twice_the_clip() -> None:
    own = epsilon(history(Spent(0, "own", 1, 1.0, 4.0), 3), 1e-5)
    assert own == epsilon(history(Spent(0, "everyone", 1, 1.0, 2.0), 3), 1e-5)


def test_clients_in_turns_pay_once_a_turn() -> None:
    turns = replace(HUNDRED, groups=4, rate=0.2, noise_multiplier=2.0)
    alone = replace(turns, groups=1)
    assert epsilon(history(turns, 8), 1e-4) == epsilon(history(alone, 2), 1e-4)
    assert epsilon(history(turns, 9), 1e-4) == epsilon(history(alone, 3), 1e-4)


def test_an_empty_history_costs_nothing_and_a_round_without_noise_everything() -> None:
    assert epsilon((), 1e-5) == 0.0
    assert epsilon(history(replace(HUNDRED, noise_multiplier=0.0), 1), 1e-5) == math.inf


def test_rounds_of_two_kinds_add_up() -> None:
    quieter, louder = (replace(HUNDRED, noise_multiplier=noise) for noise in (1.5, 3.0))
    both = epsilon((*history(quieter, 2), *history(louder, 2)), 1e-4)
    assert epsilon(history(louder, 4), 1e-4) < both < epsilon(history(quieter, 4), 1e-4)


def test_rounds_whose_neighbours_differ_have_no_sum() -> None:
    with pytest.raises(PlanError, match="found add_or_remove and replace"):
        epsilon((*history(HUNDRED, 1), *history(replace(HUNDRED, sampler="fixed"), 1)), 1e-4)


@pytest.mark.parametrize(("sampler", "target"), [("poisson", 0.5), ("fixed", 4.0), ("own", 2.0)])
def test_the_noise_that_is_found_keeps_the_promise_and_a_little_less_does_not(sampler: str, target: float) -> None:
    spent = Spent(0, sampler, 200, 0.1, 0.0)
    noise = calibrated(spent, 3, target, 1e-3)
    least = replace(spent, noise_multiplier=noise)
    less = replace(spent, noise_multiplier=noise * 0.997 - 0.002)
    assert epsilon(history(least, 3), 1e-3) <= target < epsilon(history(less, 3), 1e-3)


def test_a_promise_that_no_noise_keeps_is_refused_with_one_that_can_be_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accountant, "MOST_NOISE", 5.0)
    spent = Spent(0, "everyone", 10, 1.0, 0.0)
    with pytest.raises(PlanError, match=r"at most 5, found 0.01 at delta 1e-05; raise epsilon to [\d.e-]+ or") as said:
        calibrated(spent, 4, 0.01, 1e-5)
    named = float(str(said.value).split("raise epsilon to ")[1].split()[0])
    assert 0.95 * named <= epsilon(history(replace(spent, noise_multiplier=5.0), 4), 1e-5) <= named


def test_a_budget_lets_as_many_rounds_begin_as_it_was_made_for() -> None:
    spent = Spent(0, "everyone", 9, 1.0, 4.0)
    made = epsilon(history(spent, 5), 1e-4)
    assert affordable(history(spent, 4), spent, made, 1e-4)
    assert not affordable(history(spent, 5), spent, made, 1e-4)
