"""A whole secure sum in one process: every message really encoded and checked, clients that fall silent, and lies."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import numpy as np

from fedpeft.errors import FederationError, FedPeftError
from fedpeft.privacy.secure import client, messages, server
from fedpeft.privacy.secure.client_state import ClientState, Member
from fedpeft.privacy.secure.entropy import SYSTEM, Entropy
from fedpeft.privacy.secure.keys import OPEN, unsigned
from fedpeft.privacy.secure.policy import Policy
from fedpeft.privacy.secure.server import Outbox, ServerState, Sum
from fedpeft.privacy.secure.terms import Terms

PHASES = ("keys", "shares", "input", "confirmation", "opening")
"""What a client sends, in order."""

Tamper = Callable[[str, int, bytes], bytes]
"""`tamper(phase, partition, message)`: what arrives in place of a message in this phase to or from this client."""


def faithful(phase: str, partition: int, message: bytes) -> bytes:  # noqa: ARG001
    """What was sent."""
    return message


@dataclass(frozen=True)
class Script:
    """What goes wrong: who sends nothing from a phase on, and what becomes of messages on their way."""

    silent: Mapping[str, Iterable[int]] = field(default_factory=dict)
    to_client: Tamper = faithful
    to_server: Tamper = faithful


class Letter(NamedTuple):
    """One message as it arrived: in which phase, to or from which client, and whether that client sent it."""

    phase: str
    partition: int
    sent: bool
    data: bytes


@dataclass(frozen=True)
class Outcome:
    """What became of a sum: `sum`, or `failure`; all messages in order; why clients refused; and where all stand."""

    sum: Sum | None
    failure: FederationError | None
    transcript: tuple[Letter, ...]
    refusals: Mapping[int, FedPeftError]
    states: Mapping[int, ClientState]
    server: ServerState | None


def members_of(partitions: Iterable[int], policy: Policy) -> dict[int, Member]:
    """A member without a node key for each partition."""
    return {partition: Member(partition, unsigned, OPEN, policy) for partition in partitions}


def simulate(
    terms: Terms,
    values: Mapping[int, np.ndarray],
    members: Mapping[int, Member],
    script: Script | None = None,
    states: Mapping[int, ClientState] | None = None,
    entropy: Entropy = SYSTEM,
) -> Outcome:
    """The sum of the `values` `(length,)` of those of `members` who stay; one that refuses is silent from then on.

    `states` are those that clients kept from earlier sums.
    """
    script, at = script or Script(), {partition: (states or {}).get(partition, ClientState()) for partition in members}
    transcript: list[Letter] = []
    refusals: dict[int, FedPeftError] = {}
    gone: set[int] = set()
    acts = _acts(values, entropy)

    def replies(phase: str, outbox: Outbox) -> Iterator[tuple[int, bytes]]:
        gone.update(script.silent.get(phase, ()))
        for partition in sorted(set(outbox) - gone):
            arrived = script.to_client(phase, partition, outbox[partition])
            transcript.append(Letter(phase, partition, False, arrived))
            try:
                at[partition], answer = acts[phase](members[partition], at[partition], arrived)
            except FedPeftError as error:
                refusals[partition] = error
                gone.add(partition)
                continue
            sent = script.to_server(phase, partition, answer)
            transcript.append(Letter(phase, partition, True, sent))
            yield partition, sent

    found, failure, reached = None, None, list[ServerState]()
    try:
        found = _gathered(terms, members, replies, reached)
    except FederationError as error:
        failure = error
    return Outcome(found, failure, tuple(transcript), refusals, at, reached[-1] if reached else None)


def _acts(
    values: Mapping[int, np.ndarray], entropy: Entropy
) -> Mapping[str, Callable[[Member, ClientState, bytes], client.Step]]:
    """What a client does in each phase."""
    return {
        "keys": partial(client.advertise, entropy=entropy),
        "shares": partial(client.share, entropy=entropy),
        "input": lambda member, state, message: client.mask(member, state, message, values[member.partition]),
        "confirmation": client.confirm,
        "opening": client.unmask,
    }


def _gathered(
    terms: Terms,
    members: Mapping[int, Member],
    replies: Callable[[str, Outbox], server.Replies],
    reached: list[ServerState],
) -> Sum:
    """The server's side of a sum; each state that it comes to is appended to `reached`."""
    registry = next(iter(members.values())).registry
    invited = dict.fromkeys(members, messages.invitation(terms))
    state, outbox = server.gather_keys(terms, registry, set(members), replies("keys", invited))
    for phase, gather in zip(
        PHASES[1:-1], (server.gather_shares, server.gather_inputs, server.gather_confirmations), strict=True
    ):
        reached.append(state)
        state, outbox = gather(state, replies(phase, outbox))
    reached.append(state)
    return server.open_sum(state, replies(PHASES[-1], outbox))
