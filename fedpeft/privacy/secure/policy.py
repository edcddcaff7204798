"""What a client asks of a secure sum before it lends its input, and the terms that satisfy it."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from fedpeft.errors import ConfigError, PlanError, RefusalError, sentence
from fedpeft.privacy.secure.graph import exposure_bits, holders, least_degree
from fedpeft.privacy.secure.terms import Terms

_FAILING_BITS = 20.0
"""A sum that an honest server could not open is a nuisance, no leak: once in a million is seldom enough."""


@dataclass(frozen=True)
class Policy:
    """A client's own conditions; where the server does not meet them the client sends nothing more.

    `least_cohort` is the fewest inputs that a sum may have. `most_dropout` is the greatest share of those on the
    roster that may be missing from it. `colluding` is the share of the clients that may be in league with a hostile
    server: 0 asks for a threshold above a half of the holders, 1/3 for one above two thirds. With random neighbours
    the chance that the promise fails is 2^−`failure_bits` at most.

    Raises:
        ConfigError: a field is out of its range.
    """

    least_cohort: int = 3
    most_dropout: float = 0.5
    colluding: float = 0.0
    failure_bits: float = 40.0

    def __post_init__(self) -> None:
        ranges = {
            "least_cohort": (2, math.inf),
            "most_dropout": (0, 1),
            "colluding": (0, 0.5),
            "failure_bits": (1, 1e3),
        }
        for name, (least, most) in ranges.items():
            if not least <= getattr(self, name) <= most:
                expected, found = f"from {least} to {most}", str(getattr(self, name))
                remedy = "correct the node's settings"
                raise ConfigError(sentence(f"secure policy, {name}", expected=expected, found=found, remedy=remedy))

    def colluders(self, clients: int) -> int:
        """How many of so many clients may be in league with the server."""
        return _share(self.colluding, clients)

    def least_present(self, clients: int) -> int:
        """How many of so many on the roster must be in the sum."""
        return max(self.least_cohort, clients - _share(self.most_dropout, clients))


def _share(share: float, clients: int) -> int:
    """That share of the clients, rounded down, as it is written: 0.29 of 100 are 29, though not in float64."""
    return math.floor(share * clients + 1e-9)


def refusal(place: str, expected: str, found: str, remedy: str) -> RefusalError:
    """Why a client does not go on."""
    return RefusalError(sentence(place, expected=expected, found=found, remedy=remedy))


def require_cohort(policy: Policy, terms: Terms, clients: int, place: str) -> None:
    """Raises RefusalError if `clients` are too few, more than were invited, or the threshold is too low for them."""
    if not policy.least_cohort <= clients <= terms.clients:
        expected = f"a cohort of {policy.least_cohort} to {terms.clients} clients"
        raise refusal(place, expected, str(clients), "wait for more clients, or lower the node's least_cohort")
    held, colluders = holders(clients, terms.degree), policy.colluders(clients)
    if not held // 2 < terms.threshold <= held:
        expected = f"a threshold above half of the {held} holders, and no more than all"
        raise refusal(
            place, expected, str(terms.threshold), "raise the threshold: a half could be asked for either secret"
        )
    found = exposure_bits(clients, terms.degree, terms.threshold, colluders)
    if found < policy.failure_bits:
        expected = f"{policy.failure_bits:g} bits of safety from a server with {colluders} of {clients} clients"
        remedy = "raise the threshold or the degree, or lower the node's colluding or failure_bits"
        raise refusal(place, expected, f"{found:.1f} bits, at threshold {terms.threshold} of {held}", remedy)


def require_present(
    policy: Policy, terms: Terms, clients: int, present: Collection[int], held_by: Collection[int], place: str
) -> None:
    """Raises RefusalError if too few of those on the roster are `present`, or of `held_by`, a client's holders."""
    least = policy.least_present(clients)
    if len(present) < least:
        expected = f"at least {least} of {clients} clients"
        raise refusal(place, expected, str(len(present)), "wait for more clients, or raise the node's most_dropout")
    left = len(set(held_by) & set(present))
    if left < terms.threshold:
        expected = f"at least {terms.threshold} of the client's own {len(held_by)} holders"
        raise refusal(place, expected, str(left), "run the round again with clients that stay")


def terms_for(
    policy: Policy, run: str, round_: int, clients: int, length: int, width: int, dropout: float = 0.0, **fields: Any
) -> Terms:
    """Terms that a client with this policy accepts while at least that share of the clients stays that `dropout` says.

    The degree is the least that is safe, which is everybody in a small cohort. `fields` are further fields of `Terms`.

    Raises:
        PlanError: so few may stay that they could not be told from those who open another sum.
    """
    dropped = clients - _share(1.0 - dropout, clients)
    degree, threshold = least_degree(clients, dropped, policy.colluders(clients), policy.failure_bits, _FAILING_BITS)
    if threshold > clients - dropped:
        expected = f"at least {threshold} of {clients} clients that stay, so that the rest cannot open another sum"
        remedy = "invite more clients, or plan for fewer that fall silent or collude"
        raise PlanError(sentence("secure sum", expected=expected, found=str(clients - dropped), remedy=remedy))
    return Terms(run, round_, clients, degree, threshold, length, width, **fields)
