"""What a client keeps between the messages of a secure sum; it holds secrets, so it stays on the node."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

from fedpeft.errors import CheckpointError, ConfigError, sentence
from fedpeft.privacy.secure import terms as agreed_terms
from fedpeft.privacy.secure.keys import Registry, Sign
from fedpeft.privacy.secure.policy import Policy
from fedpeft.privacy.secure.terms import Terms


class Phase(IntEnum):
    """What a client has last done."""

    IDLE = 0
    ADVERTISED = 1
    SHARED = 2
    MASKED = 3
    CONFIRMED = 4
    ANSWERED = 5


@dataclass(frozen=True)
class Member:
    """Who a client is: its partition, how it signs, whose signatures it takes, and its conditions."""

    partition: int
    sign: Sign
    registry: Registry
    policy: Policy = field(default_factory=Policy)


@dataclass(frozen=True)
class ClientState:
    """Where a client stands. `rounds` is the latest round of each run that it has shared secrets in.

    `sealing` and `masking` are its secret keys and `seed` that of its own mask; `own` is its share of that seed, and
    `held` are the shares of others, by owner: of the mask key and of the seed, one after the other.
    """

    rounds: Mapping[str, int] = field(default_factory=dict)
    phase: Phase = Phase.IDLE
    terms: Terms | None = None
    sealing: bytes = b""
    masking: bytes = b""
    seed: bytes = b""
    own: bytes = b""
    roster: bytes = b""
    chosen: tuple[int, ...] = ()
    held: Mapping[int, bytes] = field(default_factory=dict)
    sharers: tuple[int, ...] = ()
    survivors: tuple[int, ...] = ()


_BYTES = ("sealing", "masking", "seed", "own", "roster")
_SETS = ("chosen", "sharers", "survivors")


def to_bytes(state: ClientState) -> bytes:
    """The state as JSON."""
    fields = {
        "rounds": dict(state.rounds),
        "phase": int(state.phase),
        "terms": agreed_terms.encode(state.terms).hex() if state.terms else "",
        "held": {str(key): shares.hex() for key, shares in state.held.items()},
        **{name: getattr(state, name).hex() for name in _BYTES},
        **{name: list(getattr(state, name)) for name in _SETS},
    }
    return json.dumps(fields, sort_keys=True).encode()


def from_bytes(data: bytes) -> ClientState:
    """The state that `to_bytes` wrote.

    Raises:
        CheckpointError: it is not one.
    """
    try:
        fields = json.loads(data)
        texts: dict[str, Any] = {name: bytes.fromhex(fields[name]) for name in _BYTES}
        sets: dict[str, Any] = {name: tuple(map(int, fields[name])) for name in _SETS}
        return ClientState(
            rounds={str(run): int(latest) for run, latest in fields["rounds"].items()},
            phase=Phase(fields["phase"]),
            terms=agreed_terms.decode(bytes.fromhex(fields["terms"])) if fields["terms"] else None,
            held={int(key): bytes.fromhex(shares) for key, shares in fields["held"].items()},
            **texts,
            **sets,
        )
    except (ValueError, KeyError, TypeError, AttributeError, ConfigError) as error:
        expected, remedy = "a client's state in a secure sum", "leave this round out; the next one begins anew"
        raise CheckpointError(
            sentence("secure state", expected=expected, found="something else", remedy=remedy)
        ) from error
