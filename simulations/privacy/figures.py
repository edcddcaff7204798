"""Figures of attacks, with intervals: rates, areas under curves, and bounds of ε that an attack proves."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
"""How sure every interval is, unless it is told otherwise."""


_THRESHOLDS = 101
"""How many quantiles of the scores of members, and of the others, are tried as thresholds."""


class Interval(NamedTuple):
    """A figure, and what it lies between."""

    value: float
    low: float
    high: float


class Rates(NamedTuple):
    """What a threshold comes to: of members so many are taken for members, of non-members so many."""

    true_positives: int
    members: int
    false_positives: int
    non_members: int


def rate(hits: int, of: int, confidence: float = CONFIDENCE) -> Interval:
    """`hits` / `of` with its exact interval; of nothing, anything from 0 to 1.

    Source: Clopper and Pearson 1934, "The Use of Confidence or Fiducial Limits Illustrated in the Case of the
    Binomial".
    """
    if of == 0:
        return Interval(math.nan, 0.0, 1.0)
    tail = (1 - confidence) / 2
    low = float(stats.beta.ppf(tail, hits, of - hits + 1)) if hits else 0.0
    high = float(stats.beta.ppf(1 - tail, hits + 1, of - hits)) if hits < of else 1.0
    return Interval(hits / of, low, high)


def auc(members: np.ndarray, non_members: np.ndarray, confidence: float = CONFIDENCE) -> Interval:
    """How likely a member scores above a non-member (equal scores count half), with its interval.

    The interval is symmetric in the log-odds, so it stays between 0 and 1; at an end of the scale, where no variance
    can be told, it is what as many hits as there are members would have.

    Source: DeLong et al. 1988, "Comparing the Areas under Two or More Correlated Receiver Operating Characteristic
    Curves", by ranks as in Sun and Xu 2014.
    """
    m, n = len(members), len(non_members)
    together = stats.rankdata(np.concatenate([members, non_members]))
    above = (together[:m] - stats.rankdata(members)) / n
    below = 1 - (together[m:] - stats.rankdata(non_members)) / m
    value = float(above.mean())
    if not 0 < value < 1 or min(m, n) < 2:
        return Interval(value, *rate(round(value * min(m, n)), min(m, n), confidence)[1:])
    error = math.sqrt(above.var(ddof=1) / m + below.var(ddof=1) / n)
    reach = stats.norm.ppf((1 + confidence) / 2) * error / (value * (1 - value))
    ends = (math.log(value / (1 - value)) + side * reach for side in (-1, 1))
    low, high = (1 / (1 + math.exp(-end)) for end in ends)
    return Interval(value, low, high)


def threshold_at(non_members: np.ndarray, most: float) -> float:
    """The least threshold above which at most the share `most` of non-members scores."""
    allowed = math.floor(most * len(non_members) + 1e-9)
    return float(np.sort(non_members)[::-1][allowed]) if allowed < len(non_members) else -math.inf


def rates_above(members: np.ndarray, non_members: np.ndarray, threshold: float) -> Rates:
    """Members and non-members whose score is above the threshold."""
    hits, misses = (int((scores > threshold).sum()) for scores in (members, non_members))
    return Rates(hits, len(members), misses, len(non_members))


def mean(values: np.ndarray, seed: int = 0, confidence: float = CONFIDENCE, draws: int = 2000) -> Interval:
    """The mean and its percentile bootstrap interval."""
    return bootstrap(values, np.mean, seed, confidence, draws)


def bootstrap(
    values: np.ndarray,
    statistic: Callable[..., np.ndarray],
    seed: int = 0,
    confidence: float = CONFIDENCE,
    draws: int = 2000,
) -> Interval:
    """A statistic of values (with `axis`) and its percentile bootstrap interval; of one value, that value.

    Source: Efron 1979, "Bootstrap Methods: Another Look at the Jackknife".
    """
    random = np.random.default_rng(seed)
    found = statistic(values[random.integers(len(values), size=(draws, len(values)))], axis=1)
    tail = (1 - confidence) / 2
    return Interval(float(statistic(values, axis=0)), *(float(np.quantile(found, q)) for q in (tail, 1 - tail)))


def epsilon_of(rates: Rates, delta: float, confidence: float = CONFIDENCE) -> float:
    """The ε that a threshold proves at `delta`, at this confidence: less is not to be had; 0 where it proves nothing.

    (ε, δ) says TPR ≤ e^ε FPR + δ, and 1 − FPR ≤ e^ε (1 − TPR) + δ. Each rate is taken at the end of its
    Clopper–Pearson interval that proves less. The threshold must not be chosen by the rows that it is counted on, and
    the rows must be in the data or not independently of each other.

    Source: Jagielski et al. 2020, "Auditing Differentially Private Machine Learning", section 3; with both
    inequalities, Nasr et al. 2021, "Adversary Instantiation", section III.
    """
    true = rate(rates.true_positives, rates.members, confidence)  # one end of each is used, so both hold at it
    false = rate(rates.false_positives, rates.non_members, confidence)
    ratios = ((true.low - delta, false.high), (1 - false.high - delta, 1 - true.low))
    found = (math.log(over / under) for over, under in ratios if over > 0 and under > 0)
    return max(0.0, *found)


def epsilon_of_scores(
    members: np.ndarray, non_members: np.ndarray, delta: float, confidence: float = CONFIDENCE
) -> float:
    """The ε that the scores prove: the best threshold of every other row, counted on the rest (see `epsilon_of`)."""
    halves = [(members[start::2], non_members[start::2]) for start in (0, 1)]
    (chosen_in, chosen_out), counted = halves
    if not (len(chosen_in) and len(chosen_out) and len(counted[0]) and len(counted[1])):
        return 0.0
    steps = np.linspace(0, 1, _THRESHOLDS)
    candidates = np.unique([np.quantile(scores, steps, method="lower") for scores in (chosen_in, chosen_out)])
    best = max(candidates, key=lambda at: epsilon_of(rates_above(chosen_in, chosen_out, float(at)), delta, confidence))
    return epsilon_of(rates_above(*counted, float(best)), delta, confidence)


def epsilon_of_guesses(right: int, guesses: int, rows: int, delta: float, confidence: float = CONFIDENCE) -> float:
    """The ε that so many right guesses prove, in one run in which each of `rows` was in or out by a fair coin.

    Source: Steinke et al. 2023, "Privacy Auditing with One (1) Training Run", theorem 5.2 and its program.
    """
    if not guesses or _p_value(right, guesses, rows, 0.0, delta) >= 1 - confidence:
        return 0.0
    low, high = 0.0, 1.0
    while _p_value(right, guesses, rows, high, delta) < 1 - confidence and high < 64:
        low, high = high, 2 * high
    for _ in range(40):
        middle = (low + high) / 2
        refuted = _p_value(right, guesses, rows, middle, delta) < 1 - confidence
        low, high = (middle, high) if refuted else (low, middle)
    return low


def _p_value(right: int, guesses: int, rows: int, epsilon: float, delta: float) -> float:
    """How likely so many right guesses or more are at most, under (ε, δ)."""
    chance = stats.binom(guesses, 1 / (1 + math.exp(-epsilon)))
    fewer = np.cumsum(chance.pmf(right - np.arange(1, right + 1))) / np.arange(1, right + 1)
    return float(min(1.0, chance.sf(right - 1) + 2 * rows * delta * (fewer.max() if right else 0.0)))
