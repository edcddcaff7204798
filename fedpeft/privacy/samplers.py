"""Who takes part in a private round, and what being drawn that way is worth.

Each sampler claims the amplification of the way it draws and of no other. Neighbouring federations differ in one
client: it is there or not (`add_or_remove`), or it is another (`replace`), which a sum of clipped updates feels twice.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedpeft.privacy.entropy import Uniforms
from fedpeft.updates import Spent

ADD_OR_REMOVE, REPLACE = "add_or_remove", "replace"


@dataclass(frozen=True)
class Population:
    """All `clients` of a federation, of whom about `cohort` take part in a round; `groups` take turns.

    `rows` are those of the smallest site (0: unknown), which makes `steps` a round, of about `batch` of them each.
    """

    clients: int
    cohort: int
    groups: int = 1
    rows: int = 0
    batch: int = 1
    steps: int = 1

    @property
    def rate(self) -> float:
        """The probability that a client is drawn in a round in which its group has its turn."""
        smallest = self.clients // self.groups
        return min(1.0, self.cohort / smallest) if smallest else 1.0


@dataclass(frozen=True)
class Sampler:
    """How a round's clients are drawn, and how that is accounted.

    `draw(population, round, uniforms)` are the partitions of round `round` (None: whoever would take part without
    privacy). `count(spent)` says how often one client can have taken part in rounds of the kind of `spent[0]`, and
    `event(dp, spent)` is one such part as an event of dp_accounting, which is given as `dp`. `relation` says which
    federations are neighbours, `tight` that the accountant of privacy loss distributions knows the event.
    """

    draw: Callable[[Population, int, Uniforms], tuple[int, ...]] | None
    event: Callable[[Any, Spent], Any]
    count: Callable[[Spent, int], int]
    relation: str = ADD_OR_REMOVE
    tight: bool = True
    claims: str = ""


def _poisson(population: Population, round_: int, draw: Uniforms) -> tuple[int, ...]:
    """Each client whose group has its turn, by a coin of its own."""
    drawn = draw(population.clients) < population.rate
    return tuple(
        p for p in range(population.clients) if drawn[p] and p % population.groups == round_ % population.groups
    )


def _fixed(population: Population, round_: int, draw: Uniforms) -> tuple[int, ...]:  # noqa: ARG001
    """`cohort` of the clients, every set of that size as likely as any other."""
    order = np.argsort(draw(population.clients), kind="stable")
    return tuple(sorted(int(p) for p in order[: population.cohort]))


def _everyone(population: Population, round_: int, draw: Uniforms) -> tuple[int, ...]:  # noqa: ARG001
    return tuple(range(population.clients))


def _gaussian(dp: Any, spent: Spent) -> Any:
    return dp.GaussianDpEvent(spent.noise_multiplier)


def _own(dp: Any, spent: Spent) -> Any:
    """Any two updates of one client are up to twice the clip apart."""
    return dp.GaussianDpEvent(spent.noise_multiplier / 2)


def _subsampled(dp: Any, spent: Spent) -> Any:
    return dp.PoissonSampledDpEvent(spent.rate, dp.GaussianDpEvent(spent.noise_multiplier))


def _concentrated(dp: Any, spent: Spent) -> Any:
    """The bound of a sum of discrete Gaussians is one of concentrated differential privacy: ρ = 1 / (2 z²)."""
    return dp.ZCDpEvent(0.5 / spent.noise_multiplier**2)


def _without_replacement(dp: Any, spent: Spent) -> Any:
    """Another client in place of one moves a sum of clipped updates by up to twice the clip."""
    return dp.SampledWithoutReplacementDpEvent(
        spent.clients, round(spent.rate * spent.clients), dp.GaussianDpEvent(spent.noise_multiplier / 2)
    )


def _each(spent: Spent, rounds: int) -> int:  # noqa: ARG001
    return rounds


def _each_step(spent: Spent, rounds: int) -> int:
    return rounds * spent.steps


def _in_turn(spent: Spent, rounds: int) -> int:
    return math.ceil(rounds / spent.groups)


SAMPLERS: Mapping[str, Sampler] = {
    "poisson": Sampler(
        _poisson, _subsampled, _in_turn, claims="each client is drawn by a coin of its own in every round"
    ),
    "fixed": Sampler(
        _fixed,
        _without_replacement,
        _each,
        relation=REPLACE,
        tight=False,
        claims="so many clients are drawn in every round, each set as likely as any other",
    ),
    "everyone": Sampler(_everyone, _gaussian, _each, claims="nothing: every client is in every round"),
    "own": Sampler(None, _own, _each, claims="nothing: each client answers for itself, in any round"),
    "examples": Sampler(
        None, _subsampled, _each_step, claims="each example of a site is drawn by a coin of its own in every step"
    ),
    "shuffled": Sampler(None, _gaussian, _each_step, claims="nothing: any example may be in every step"),
    "summed": Sampler(None, _concentrated, _each, tight=False, claims="nothing: any client may be in every sum"),
    "reachable": Sampler(None, _gaussian, _each, claims="nothing: any client may be in every round"),
}
"""Every way to draw and to account, by name; the last five leave the clients of a round to the run."""


def grouped(history: tuple[Spent, ...]) -> dict[Spent, int]:
    """How often each kind of expense stands in a history, whatever the round."""
    return dict(Counter(spent.anywhere for spent in history))
