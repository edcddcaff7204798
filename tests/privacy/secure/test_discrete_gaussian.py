from __future__ import annotations

import math
from decimal import Decimal, localcontext
from fractions import Fraction
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special, stats

from fedpeft.errors import ConfigError
from fedpeft.privacy.secure import discrete_gaussian as module
from fedpeft.privacy.secure.discrete_gaussian import (
    concentration,
    discrete_gaussian,
    exact_below,
    exact_magnitude,
    gap,
    renyi,
)


def law(variance: float, reach: int) -> np.ndarray:
    """The chances of −reach … reach."""
    y = np.arange(-reach, reach + 1)
    found = np.exp(-(y**2) / (2 * variance))
    return found / found.sum()


def fits(drawn: np.ndarray, variance: float) -> float:
    """The p-value of Pearson's test of the draws against the law; places of fewer than ten draws are taken together."""
    reach = math.ceil(12 * math.sqrt(variance)) + 2
    expected = law(variance, reach) * len(drawn)
    observed = np.bincount(drawn + reach, minlength=2 * reach + 1).astype(float)
    often = expected >= 10
    found = np.append(observed[often], observed[~often].sum())
    meant = np.append(expected[often], expected[~often].sum())
    if meant[-1] < 10:
        found, meant = np.append(found[:-2], found[-2:].sum()), np.append(meant[:-2], meant[-2:].sum())
    return float(stats.chisquare(found, meant).pvalue)


@pytest.mark.parametrize("variance", [0.2, 0.9, 1.0, Fraction(7, 3), 10.3, 400.0, 30_000.0])
def test_draws_follow_the_law(variance: float | Fraction) -> None:
    drawn = discrete_gaussian(variance, 200_000, np.random.default_rng(1).bytes)
    assert drawn.dtype == np.int64
    assert len(drawn) == 200_000
    assert fits(drawn, float(variance)) > 1e-4


def test_the_test_of_the_law_tells_a_rounded_normal_from_it() -> None:
    rounded = np.rint(np.random.default_rng(0).normal(0, 1, 200_000)).astype(np.int64)
    assert fits(rounded, 1.0) < 1e-4
    assert fits(discrete_gaussian(1.05, 200_000, np.random.default_rng(0).bytes), 1.0) < 1e-4


def test_a_wide_law_has_its_moments() -> None:
    drawn = discrete_gaussian(2.0**40, 100_000, np.random.default_rng(2).bytes) / 2.0**20
    assert stats.kstest(drawn, "norm").pvalue > 1e-4


@pytest.mark.parametrize("variance", [0.3, 5.0])
def test_the_exact_path_has_the_same_law(variance: float, monkeypatch: pytest.MonkeyPatch) -> None:
    # With no trust in float64 at all every comparison is made in exact arithmetic.
    sizes, kept = module._magnitudes, module._kept
    monkeypatch.setattr(module, "_magnitudes", lambda scale, drawn, entropy: sizes(scale, drawn, entropy, 1.0))
    monkeypatch.setattr(module, "_kept", lambda *arguments: kept(*arguments, 1.0))
    drawn = discrete_gaussian(variance, 2500, np.random.default_rng(3).bytes)
    assert fits(drawn, variance) > 1e-4


def test_both_paths_agree_wherever_float64_can_tell() -> None:
    words = np.random.default_rng(4).integers(0, 2**64, 3000, np.uint64)
    never = np.random.default_rng(5).bytes
    sizes = module._magnitudes(3, words, never)
    assert (sizes == module._magnitudes(3, words, never, 1.0)).all()
    shuffled = np.random.default_rng(6).permutation(words)
    kept = module._kept(sizes, Fraction(5), 3, shuffled, never)
    assert (kept == module._kept(sizes, Fraction(5), 3, shuffled, never, 1.0)).all()
    assert 0.2 < kept.mean() < 0.95


def share_of(bound: Decimal) -> tuple[int, float]:
    """The word that a bound in [0, 1) begins with, and how far up in that word's range it lies."""
    scaled = bound * 2**64
    word = int(scaled)
    return word, float(scaled - word)


@pytest.mark.parametrize("exponent", [Fraction(1, 3), Fraction(2), Fraction(50)])
def test_a_word_on_the_bound_is_settled_by_more_bits_in_the_right_proportion(exponent: Fraction) -> None:
    with localcontext(prec=60):
        word, share = share_of((-Decimal(exponent.numerator) / exponent.denominator).exp())
    entropy = np.random.default_rng(7).bytes
    below = sum(exact_below(exponent, word, entropy) for _ in range(2000))
    assert stats.binomtest(below, 2000, share).pvalue > 1e-4
    assert all(exact_below(exponent, word - 1, entropy) for _ in range(20))
    assert not any(exact_below(exponent, word + 1, entropy) for _ in range(20))


def test_a_word_on_the_border_of_two_magnitudes_is_settled_by_more_bits() -> None:
    with localcontext(prec=60):
        word, share = share_of((-Decimal(4) / 3).exp())
    entropy = np.random.default_rng(8).bytes
    found = [exact_magnitude(3, word, entropy) for _ in range(2000)]
    assert set(found) == {3, 4}
    # Below the bound u is small, so its logarithm is great: 4 or more.
    assert stats.binomtest(found.count(4), 2000, share).pvalue > 1e-4


def test_the_first_and_the_last_word_are_settled() -> None:
    entropy = np.random.default_rng(9).bytes
    assert exact_magnitude(1, 2**64 - 1, entropy) == 0
    assert exact_magnitude(1, 0, entropy) >= 44
    assert exact_below(Fraction(0), 2**64 - 1, entropy)
    assert not exact_below(Fraction(10**15), 0, entropy)


def test_zero_comes_as_often_as_it_should_and_both_signs_alike() -> None:
    drawn = discrete_gaussian(0.5, 300_000, np.random.default_rng(10).bytes)
    assert stats.binomtest(int((drawn == 0).sum()), len(drawn), law(0.5, 30)[30]).pvalue > 1e-4
    assert stats.binomtest(int((drawn > 0).sum()), int((drawn != 0).sum())).pvalue > 1e-4


@given(st.integers(0, 700))
@settings(max_examples=20)
def test_as_many_are_drawn_as_are_asked_for(count: int) -> None:
    assert discrete_gaussian(2.5, count).shape == (count,)


def test_the_systems_entropy_gives_other_draws_each_time() -> None:
    assert (discrete_gaussian(1e6, 50) != discrete_gaussian(1e6, 50)).any()


@pytest.mark.parametrize("variance", [0.0, -1.0, math.nan, math.inf, 2.0**61])
def test_a_variance_without_a_law_is_refused(variance: float) -> None:
    with pytest.raises(ConfigError, match="expected a variance above 0 and up to"):
        discrete_gaussian(variance, 1)


def test_the_gap_between_a_sum_of_discrete_gaussians_and_one_of_them() -> None:
    # n = 3, σ² = 1/2: 10 (e^(−π²/2) + e^(−2π²/3)).
    assert gap(0.5, 1) == 0.0
    assert gap(0.5, 3) == pytest.approx(10 * (math.exp(-(math.pi**2) / 2) + math.exp(-2 * math.pi**2 / 3)))


def test_the_bound_is_that_of_the_gaussian_where_noise_is_wide() -> None:
    # Δ₂² / (2 n σ²) = 36 / (2 · 10 · 100).
    assert concentration(100.0, 10, 6.0, 36.0, 10**6) == pytest.approx(36 / 2000)
    assert renyi(8.0, 100.0, 10, 6.0, 36.0, 10**6) == pytest.approx(8 * 36 / 2000)


def test_each_of_the_three_bounds_is_the_least_somewhere() -> None:
    sigma, tau = math.sqrt(2 * 0.5), gap(0.5, 2)
    assert renyi(2.0, 0.5, 2, 1.0, 1.0, 1) == pytest.approx(min(1 + tau, 1 + 2 * tau + tau**2))
    assert renyi(1.0, 0.5, 2, 3.0, 1.0, 10**4) == pytest.approx(4.5 + tau * (1.0 / sigma) + tau**2 * 10**4 / 2)
    assert renyi(1.0, 0.5, 2, 3.0, 900.0, 900) == pytest.approx((3 / sigma + tau * 30) ** 2 / 2)
    assert concentration(0.5, 2, 3.0, 900.0, 900) == renyi(1.0, 0.5, 2, 3.0, 900.0, 900)


@cache
def sum_law(variance: float, clients: int) -> np.ndarray:
    """The logs of the chances of a sum of so many draws, far into the tails, where float64 itself has only zeros."""
    y = np.arange(-150, 151)
    one = -(y**2) / (2 * variance)
    one -= special.logsumexp(one)
    total = one
    for _ in range(clients - 1):
        wide = np.full(len(total) + 2 * (len(one) - 1), -np.inf)
        wide[len(one) - 1 : len(one) - 1 + len(total)] = total
        total = special.logsumexp(np.lib.stride_tricks.sliding_window_view(wide, len(one)) + one, axis=1)
    return total


@pytest.mark.parametrize("order", [1.5, 2.0, 8.0, 32.0])
@pytest.mark.parametrize("clients", [2, 5])
@pytest.mark.parametrize("variance", [0.25, 0.5, 1.0])
@pytest.mark.parametrize("shift", [1, 3])
def test_the_divergence_of_real_sums_is_within_the_bound(
    order: float, clients: int, variance: float, shift: int
) -> None:
    logs = sum_law(variance, clients)
    ours, theirs = logs[shift:], logs[:-shift]
    found = float(special.logsumexp(order * ours + (1 - order) * theirs)) / (order - 1)
    assert order * shift**2 / (2 * clients * variance) < found + 0.5
    assert found <= renyi(order, variance, clients, shift, shift, 1) + 1e-9


def test_noise_too_narrow_for_the_theorem_is_refused() -> None:
    with pytest.raises(ConfigError, match="expected a variance of at least 1/4"):
        concentration(0.2, 10, 1.0, 1.0, 1)
