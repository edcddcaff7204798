"""What the server does between the phases: replies in, a message for each client out, and in the end the sum.

A reply that is malformed, not signed as it should be, or a client's second counts as none, and is named in `refused`.
A round ends without a sum where fewer are left than the threshold, or where a client lied in a way that only the sum
tells: it opened a false share, or masked with other keys than its own.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np

from fedpeft.errors import PacketError, QuorumError, sentence
from fedpeft.privacy.secure import graph, keys, messages, opening, statements
from fedpeft.privacy.secure.keys import Registry
from fedpeft.privacy.secure.messages import Entry, Inbox, Opening, Request, Survivors
from fedpeft.privacy.secure.packing import top, unpack, word
from fedpeft.privacy.secure.terms import Terms

Replies = Iterable[tuple[int, bytes]]
"""What has come, with the partition of the node that it came from, in any order."""

Outbox = Mapping[int, bytes]
"""A message for each partition that is asked."""

_Found = TypeVar("_Found")
_REMEDY = "run the round again with more clients, or with terms that let more of them fall silent"


@dataclass(frozen=True)
class ServerState:
    """Where the server stands in one sum; every mapping is by partition, `shares` by owner and then by holder.

    `signatures` are those of the phase before: on who shared, then on who survived. `total` is the sum of the masked
    inputs so far. `refused` says whose replies counted for nothing, and why.
    """

    terms: Terms
    registry: Registry
    entries: Mapping[int, Entry] = field(default_factory=dict)
    roster: bytes = b""
    shares: Mapping[int, Mapping[int, bytes]] = field(default_factory=dict)
    signatures: Mapping[int, bytes] = field(default_factory=dict)
    survivors: tuple[int, ...] = ()
    total: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint32))
    refused: tuple[tuple[int, str], ...] = ()

    @property
    def sharers(self) -> tuple[int, ...]:
        """Who has shared secrets."""
        return tuple(sorted(self.shares))

    @property
    def dropped(self) -> tuple[int, ...]:
        """Who has shared secrets, and then sent no input."""
        return tuple(sorted(set(self.shares) - set(self.survivors)))

    def holders(self, owner: int) -> set[int]:
        """Who holds shares of a client's secrets, itself included."""
        return {*self.shares[owner], owner}


@dataclass(frozen=True)
class Sum:
    """`total` `(length,)` is the sum of the survivors' inputs, int64, from −2^(width − 1) to 2^(width − 1) − 1."""

    total: np.ndarray
    survivors: tuple[int, ...]
    dropped: tuple[int, ...]
    refused: tuple[tuple[int, str], ...]


def gather_keys(
    terms: Terms, registry: Registry, invited: Collection[int], replies: Replies
) -> tuple[ServerState, Outbox]:
    """After phase 0: the roster, for all on it.

    Raises:
        QuorumError: fewer than the threshold are left, here and after every phase.
    """
    seen: set[bytes] = set()

    def read(partition: int, data: bytes) -> Entry:
        entry = messages.read_keys(terms, partition, data)
        _require_signature(registry, partition, statements.keys(terms, entry), entry.signature)
        both = entry.sealing, entry.masking
        if seen & {*both} or both[0] == both[1] or not all(map(keys.usable, both)):
            raise _unfit(partition, "two keys of its own, of full order", "others")
        seen.update(both)
        return entry

    state, entries = _read(ServerState(terms, registry), replies, read, invited)
    _require_quorum(state, len(entries), "keys")
    roster = messages.roster(terms, entries)
    return replace(state, entries=entries, roster=roster), dict.fromkeys(entries, roster)


def gather_shares(state: ServerState, replies: Replies) -> tuple[ServerState, Outbox]:
    """After phase 1: for each that shared, who else did and what these sealed for it."""
    held = graph.holders(len(state.entries), state.terms.degree)

    def read(partition: int, data: bytes) -> Mapping[int, bytes]:
        sealed = messages.read_shares(state.terms, partition, data)
        if len(sealed) != held - 1 or not set(sealed) <= set(state.entries) - {partition}:
            raise _unfit(partition, f"shares for {held - 1} others on the roster", f"{len(sealed)}, or for others")
        return sealed

    state, shares = _read(state, replies, read, state.entries)
    _require_quorum(state, len(shares), "shares")
    boxes = {
        partition: Inbox(
            tuple(sorted(shares)), {owner: sealed[partition] for owner, sealed in shares.items() if partition in sealed}
        )
        for partition in shares
    }
    outbox = {partition: messages.inbox(state.terms, partition, box) for partition, box in boxes.items()}
    return replace(state, shares=shares), outbox


def gather_inputs(state: ServerState, replies: Replies) -> tuple[ServerState, Outbox]:
    """After phase 2: for each that survived, who else did, and what those whose shares it holds signed.

    Inputs are added up as `replies` yields them, so that memory is that of one.
    """
    terms = state.terms
    total = np.zeros(terms.words, word(terms.width))
    statement = statements.sharers(terms, statements.context(terms, state.roster), state.sharers)

    def read(partition: int, data: bytes) -> bytes:
        signature, packed = messages.read_input(terms, partition, data)
        _require_signature(state.registry, partition, statement, signature)
        np.add(total, unpack(packed, terms.words, terms.width), out=total)
        return signature

    state, signatures = _read(state, replies, read, state.shares)
    _require_quorum(state, len(signatures), "inputs")
    survivors = tuple(sorted(signatures))
    outbox = {}
    for partition in survivors:
        owners = [owner for owner in survivors if partition in state.shares[owner]]
        message = Survivors(survivors, {owner: signatures[owner] for owner in owners})
        outbox[partition] = messages.survivors(terms, partition, message)
    return replace(state, survivors=survivors, signatures=signatures, total=total), outbox


def gather_confirmations(state: ServerState, replies: Replies) -> tuple[ServerState, Outbox]:
    """After phase 3: for each that has confirmed, whose secrets to open and the signatures of its own holders.

    Of these as many as the threshold, so that it has no more to verify; who has fewer is not asked.
    """
    terms = state.terms
    context = statements.context(terms, state.roster)
    statement = statements.survivors(terms, context, state.sharers, state.survivors)

    def read(partition: int, data: bytes) -> bytes:
        signature = messages.read_confirmation(terms, partition, data)
        _require_signature(state.registry, partition, statement, signature)
        return signature

    state, signatures = _read(state, replies, read, state.survivors)
    outbox = {}
    for partition in sorted(signatures):
        theirs = sorted(set(state.shares[partition]) & set(signatures))[: terms.threshold - 1]
        if len(theirs) == terms.threshold - 1:
            message = Request(state.survivors, state.dropped, {peer: signatures[peer] for peer in theirs})
            outbox[partition] = messages.request(terms, partition, message)
    _require_quorum(state, len(outbox), "confirmations")
    return replace(state, signatures=signatures), outbox


def open_sum(state: ServerState, replies: Replies) -> Sum:
    """After phase 4: the sum of the survivors' inputs.

    Raises:
        QuorumError: of some client fewer than the threshold of its holders have answered.
        FederationError: shares do not fit together, or the sum does not say how many inputs it has.
    """

    def read(partition: int, data: bytes) -> Opening:
        found = messages.read_opening(state.terms, partition, data)
        owners = {*found.seeds, *found.keys}
        if not set(found.seeds) <= set(state.survivors) or not set(found.keys) <= set(state.dropped):
            raise _unfit(partition, "seeds of survivors and keys of those who dropped", "others")
        if any(partition not in state.holders(owner) for owner in owners):
            raise _unfit(partition, "shares that it holds", "others")
        return found

    state, openings = _read(state, replies, read, state.survivors)
    _require_quorum(state, len(openings), "openings")
    seeds, masking = (
        _by_owner({who: getattr(one, name) for who, one in openings.items()}) for name in ("seeds", "keys")
    )
    parties = opening.Parties(state.terms, state.roster, state.entries, state.shares, state.survivors, state.dropped)
    residues = state.total - opening.masks_left(parties, seeds, masking)
    residues &= residues.dtype.type(top(state.terms.width))
    total = opening.counted(state.terms, residues, len(state.survivors))
    return Sum(total, state.survivors, state.dropped, state.refused)


def _read(
    state: ServerState, replies: Replies, read: Callable[[int, bytes], _Found], asked: Collection[int]
) -> tuple[ServerState, dict[int, _Found]]:
    """What `read` makes of the reply of each that was asked, in order, and the state with those that it cannot read."""
    found: dict[int, _Found] = {}
    refused = list(state.refused)
    for partition, data in replies:
        try:
            if partition not in asked or partition in found:
                raise _unfit(partition, "one reply from each that was asked", "another")
            found[partition] = read(partition, data)
        except PacketError as error:
            refused.append((partition, str(error)))
    return replace(state, refused=tuple(refused)), dict(sorted(found.items()))


def _by_owner(openings: Mapping[int, Mapping[int, bytes]]) -> dict[int, dict[int, bytes]]:
    """Shares by owner and then by holder, of shares by holder and then by owner."""
    found: dict[int, dict[int, bytes]] = {}
    for holder, shares in openings.items():
        for owner, share in shares.items():
            found.setdefault(owner, {})[holder] = share
    return found


def _require_quorum(state: ServerState, found: int, what: str) -> None:
    if found < state.terms.threshold:
        place = f"secure sum of round {state.terms.round}, {what}"
        refused = f", {len(state.refused)} replies refused" if state.refused else ""
        expected = f"those of at least {state.terms.threshold} clients"
        raise QuorumError(sentence(place, expected=expected, found=f"{found}{refused}", remedy=_REMEDY))


def _require_signature(registry: Registry, partition: int, statement: bytes, signature: bytes) -> None:
    if not registry.verify(partition, statement, signature):
        raise _unfit(partition, "a signature by its node's key on what it was told", "another")


def _unfit(partition: int, expected: str, found: str) -> PacketError:
    place = f"secure reply of partition {partition}"
    return PacketError(sentence(place, expected=expected, found=found, remedy="leave it out"))
