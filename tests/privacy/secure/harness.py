"""Small secure sums for the tests: members with and without node keys, inputs, and messages changed on their way."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache

import numpy as np
from cryptography.hazmat.primitives.asymmetric import ec

from fedpeft.privacy.secure import messages
from fedpeft.privacy.secure.client_state import Member
from fedpeft.privacy.secure.keys import Sign, pinned, signing
from fedpeft.privacy.secure.policy import Policy
from fedpeft.privacy.secure.simulation import Outcome, Script, Tamper, members_of, simulate
from fedpeft.privacy.secure.terms import Terms

LENIENT = Policy(least_cohort=2, most_dropout=1.0, failure_bits=1.0)
TERMS = Terms("run", 3, clients=5, degree=4, threshold=3, length=40, width=20, signed=False)
SIGNED = replace(TERMS, signed=True)


@cache
def node_key(partition: int) -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP384R1())


def signer(partition: int) -> Sign:
    return signing(node_key(partition))


def members(terms: Terms = TERMS, policy: Policy = LENIENT) -> dict[int, Member]:
    if not terms.signed:
        return members_of(range(terms.clients), policy)
    registry = pinned({partition: node_key(partition).public_key() for partition in range(terms.clients)})
    return {partition: Member(partition, signer(partition), registry, policy) for partition in range(terms.clients)}


def inputs(terms: Terms = TERMS, seed: int = 0) -> dict[int, np.ndarray]:
    """Integers of which any sum fits the width, each client's own."""
    most = 2 ** (terms.width - 1) // terms.clients - 1
    draw = np.random.default_rng(seed)
    return {partition: draw.integers(-most, most + 1, terms.length) for partition in range(terms.clients)}


def at(phase: str, partitions: set[int] | None, change: Callable[[int, bytes], bytes]) -> Tamper:
    """`change(partition, message)` in one phase, for some of the clients or all; every other message as it was."""

    def tamper(found: str, partition: int, message: bytes) -> bytes:
        meant = found == phase and (partitions is None or partition in partitions)
        return change(partition, message) if meant else message

    return tamper


def run(
    terms: Terms = TERMS, script: Script | None = None, policy: Policy = LENIENT, values: Mapping | None = None
) -> Outcome:
    return simulate(terms, values or inputs(terms), members(terms, policy), script)


def refused(terms: Terms, script: Script, victim: int, policy: Policy = LENIENT) -> str:
    """Why the victim refused; it has sent nothing since, and no sum was opened with a share of its own."""
    found = run(terms, script, policy)
    at_ = [number for number, letter in enumerate(found.transcript) if letter.partition == victim]
    assert not found.transcript[at_[-1]].sent
    return str(found.refusals[victim])


def changed_inbox(terms: Terms, change: Callable[[messages.Inbox], messages.Inbox]) -> Callable[[int, bytes], bytes]:
    return lambda partition, data: messages.inbox(terms, partition, change(messages.read_inbox(terms, partition, data)))


def changed_survivors(
    terms: Terms, change: Callable[[messages.Survivors], messages.Survivors]
) -> Callable[[int, bytes], bytes]:
    return lambda partition, data: messages.survivors(
        terms, partition, change(messages.read_survivors(terms, partition, data))
    )


def changed_request(
    terms: Terms, change: Callable[[messages.Request], messages.Request]
) -> Callable[[int, bytes], bytes]:
    return lambda partition, data: messages.request(
        terms, partition, change(messages.read_request(terms, partition, data))
    )


def changed_roster(
    terms: Terms, change: Callable[[dict[int, messages.Entry]], dict[int, messages.Entry]]
) -> Callable[[int, bytes], bytes]:
    return lambda partition, data: messages.roster(terms, change(messages.read_roster(terms, data)))
