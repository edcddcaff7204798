"""What a history of private rounds amounts to, and how much noise a promise needs; a pure function of the history.

The arithmetic is that of dp_accounting: privacy loss distributions (Koskela et al. 2020, "Computing Tight Differential
Privacy Guarantees Using FFT") where they know the event, else Rényi differential privacy (Mironov 2017).
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from fedpeft.errors import PlanError, sentence
from fedpeft.privacy.samplers import ADD_OR_REMOVE, REPLACE, SAMPLERS, grouped
from fedpeft.updates import Spent

MOST_NOISE = 10_000.0
"""The greatest noise multiplier that is worth trying: beyond it nothing is left to learn."""

MOST_TIGHT = 200.0
"""The ε, before any amplification, up to which the tight accountant is asked: beyond, it takes very much memory."""


def epsilon(history: tuple[Spent, ...], delta: float) -> float:
    """The ε, at δ = `delta`, that all expenses in `history` amount to together; infinite where one had no noise.

    Raises:
        PlanError: dp_accounting is not installed, or the history mixes samplers that have no neighbours in common.
    """
    kinds = tuple(sorted(grouped(history).items(), key=lambda item: repr(item[0])))
    return _epsilon(kinds, delta)


def calibrated(expense: Spent, rounds: int, target: float, delta: float) -> float:
    """The least noise multiplier, to a thousandth, with which `rounds` such expenses cost at most ε = `target`.

    Raises:
        PlanError: no noise up to `MOST_NOISE` does, or dp_accounting is not installed.
    """
    return _calibrated(expense.anywhere, rounds, target, delta)


def affordable(history: tuple[Spent, ...], expense: Spent, target: float, delta: float) -> bool:
    """Whether ε stays at most `target` with one more expense."""
    return epsilon((*history, expense), delta) <= target


@functools.lru_cache(maxsize=1024)
def _epsilon(kinds: tuple[tuple[Spent, int], ...], delta: float) -> float:
    if not kinds:
        return 0.0
    if any(spent.noise_multiplier <= 0 for spent, _ in kinds):
        return math.inf
    samplers = [SAMPLERS[spent.sampler] for spent, _ in kinds]
    relations = sorted({sampler.relation for sampler in samplers})
    if len(relations) > 1:
        raise PlanError(
            sentence(
                "privacy ledger",
                expected="rounds whose neighbouring federations are the same",
                found=" and ".join(relations),
                remedy="start a new run",
            )
        )
    dp, (loose, tight) = _accountants(relations[0])
    exact = all(sampler.tight for sampler in samplers) and _without_amplification(kinds, delta) <= MOST_TIGHT
    quick = _by_coins(dp, kinds, delta) if exact else None
    return _composed(dp, tight if exact else loose, kinds, delta) if quick is None else quick


def _without_amplification(kinds: tuple[tuple[Spent, int], ...], delta: float) -> float:
    """What the history costs if everybody was in every round.

    Source: Bun and Steinke 2016, "Concentrated Differential Privacy", propositions 1.6 and 1.3.
    """
    rho: float = sum(rounds / (2.0 * spent.noise_multiplier**2) for spent, rounds in kinds)
    return rho + 2.0 * math.sqrt(rho * math.log(1.0 / delta))


def _composed(dp: Any, fresh: Callable[[], Any], kinds: tuple[tuple[Spent, int], ...], delta: float) -> float:
    accountant = fresh()
    for spent, rounds in kinds:
        sampler = SAMPLERS[spent.sampler]
        accountant.compose(sampler.event(dp, spent), sampler.count(spent, rounds))
    found: float = accountant.get_epsilon(delta)
    return found


def _by_coins(dp: Any, kinds: tuple[tuple[Spent, int], ...], delta: float) -> float | None:
    """What the tight accountant says, to the bit, where all rounds are of Poisson draws; None where some are not.

    The distribution of a single round is most of its work, and is kept from one round to the next.
    """
    from dp_accounting.pld import privacy_loss_distribution

    total = privacy_loss_distribution.identity()
    for spent, rounds in kinds:
        sampler = SAMPLERS[spent.sampler]
        event = sampler.event(dp, spent)
        if not isinstance(event, dp.PoissonSampledDpEvent) or not event.sampling_probability:
            return None
        one = _subsampled(event.event.noise_multiplier, event.sampling_probability)
        total = total.compose(one.self_compose(sampler.count(spent, rounds)))
    found: float = total.get_epsilon_for_delta(delta)
    return found


@functools.lru_cache(maxsize=16)
def _subsampled(noise: float, rate: float) -> Any:
    """The privacy loss distribution of one round in which each client is drawn with probability `rate`."""
    from dp_accounting.pld import privacy_loss_distribution

    return privacy_loss_distribution.from_gaussian_mechanism(noise, sampling_prob=rate)


@functools.lru_cache(maxsize=64)
def _calibrated(expense: Spent, rounds: int, target: float, delta: float) -> float:
    def cost(noise: float) -> float:
        return _epsilon(((replace(expense, noise_multiplier=noise), rounds),), delta)

    high = 1.0
    while cost(high) > target:
        high *= 1.5 if high < 10 else 4
        if high > MOST_NOISE:
            raise PlanError(
                sentence(
                    "privacy epsilon",
                    expected=f"a budget that {rounds} rounds keep with a noise multiplier of at most {MOST_NOISE:g}",
                    found=f"{target:g} at delta {delta:g}",
                    remedy=f"raise epsilon to {_rounded_up(cost(MOST_NOISE)):g} or more, or run fewer rounds",
                )
            )
    low = high / (1.5 if high < 15 else 4)
    while cost(low) <= target and low > 1e-3:
        high, low = low, low / 1.5
    return _least(lambda noise: cost(noise) <= target, low, high)


def _least(enough: Callable[[float], bool], low: float, high: float) -> float:
    """The least multiple of 10⁻³ in (low, high] that is enough; `high` is, `low` is not."""
    scale = 1000
    below, above = math.floor(low * scale), math.ceil(high * scale)
    while above - below > max(1, above // 1000):
        middle = (below + above) // 2
        below, above = (below, middle) if enough(middle / scale) else (middle, above)
    return above / scale


def _rounded_up(value: float) -> float:
    """`value` with two significant digits, never less than it is."""
    step = 10.0 ** (math.floor(math.log10(value)) - 1) if 0 < value < math.inf else 1.0
    return math.ceil(value / step) * step


def _accountants(relation: str) -> tuple[Any, tuple[Callable[[], Any], Callable[[], Any]]]:
    """The library, and its accountants for such neighbours: a quick one that overstates, and a tight one."""
    try:
        import dp_accounting as dp  # an extra: it wants older versions of what other libraries share
        from dp_accounting import pld, rdp
    except ImportError as error:
        raise PlanError(
            sentence(
                "privacy.mechanism",
                expected="the library that keeps the account, dp-accounting",
                found="none",
                remedy="install it with pip install 'fedpeft[privacy]'",
            )
        ) from error
    logging.getLogger("absl").setLevel(logging.ERROR)  # orders at which a series does not converge are left out
    neighbours = {
        ADD_OR_REMOVE: dp.NeighboringRelation.ADD_OR_REMOVE_ONE,
        REPLACE: dp.NeighboringRelation.REPLACE_ONE,
    }[relation]
    return dp, (lambda: rdp.RdpAccountant(neighboring_relation=neighbours), lambda: pld.PLDAccountant(neighbours))
