"""What clients and server send each other: each message as bytes, and read from bytes.

Every reader raises PacketError where the bytes are not such a message of this session, for or from this partition.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fedpeft.errors import ConfigError, PacketError
from fedpeft.privacy.secure import packing
from fedpeft.privacy.secure import terms as agreed_terms
from fedpeft.privacy.secure.framing import EVERYONE, HEADER_BYTES, Body, Kind, frame, ids, kind_of, table, unreadable
from fedpeft.privacy.secure.keys import KEY_BYTES, SEAL_BYTES, SIGNATURE_BYTES
from fedpeft.privacy.secure.shamir import SHARE_BYTES
from fedpeft.privacy.secure.terms import Terms

SHARES_BYTES = 2 * SHARE_BYTES
SEALED_BYTES = SHARES_BYTES + SEAL_BYTES


@dataclass(frozen=True)
class Entry:
    """A client on the roster: its public keys for sealed shares and for masks, and its signature on them."""

    partition: int
    sealing: bytes
    masking: bytes
    signature: bytes


@dataclass(frozen=True)
class Inbox:
    """What a client is told in phase 2: who shared, and the shares that are for it, sealed, by sender."""

    sharers: tuple[int, ...]
    sealed: Mapping[int, bytes]


@dataclass(frozen=True)
class Survivors:
    """What a client is told in phase 3: who survived, and what its neighbours signed on who shared."""

    survivors: tuple[int, ...]
    signatures: Mapping[int, bytes]


@dataclass(frozen=True)
class Request:
    """What a client is asked in phase 4: whose seeds and whose mask keys to open, and who signed the survivors."""

    active: tuple[int, ...]
    dropped: tuple[int, ...]
    signatures: Mapping[int, bytes]


@dataclass(frozen=True)
class Opening:
    """What a client answers in phase 4: its shares of seeds and of mask keys, by owner."""

    seeds: Mapping[int, bytes]
    keys: Mapping[int, bytes]


def invitation(terms: Terms) -> bytes:
    """The terms, for everybody."""
    return frame(Kind.INVITATION, terms, EVERYONE, agreed_terms.encode(terms))


def read_invitation(data: bytes) -> Terms:
    """The terms in an invitation.

    Raises:
        PacketError: it is not one, or the terms are out of range.
    """
    kind = kind_of(data)
    try:
        terms = agreed_terms.decode(data[HEADER_BYTES:])
    except ConfigError as error:
        raise PacketError(str(error)) from error
    if kind != Kind.INVITATION or data != invitation(terms):
        raise unreadable("invitation", "an invitation to a secure sum", kind.name.lower())
    return terms


def keys(terms: Terms, entry: Entry) -> bytes:
    """The keys of one client."""
    return frame(Kind.KEYS, terms, entry.partition, entry.sealing, entry.masking, entry.signature)


def read_keys(terms: Terms, partition: int, data: bytes) -> Entry:
    """The keys that a client sent."""
    body = Body(Kind.KEYS, terms, partition, data)
    entry = Entry(partition, body.take(KEY_BYTES), body.take(KEY_BYTES), body.take(_signature(terms)))
    body.end()
    return entry


def roster(terms: Terms, entries: Mapping[int, Entry]) -> bytes:
    """The keys of all, for everybody."""
    texts = {key: entry.sealing + entry.masking + entry.signature for key, entry in entries.items()}
    return frame(Kind.ROSTER, terms, EVERYONE, table(texts))


def read_roster(terms: Terms, data: bytes) -> dict[int, Entry]:
    """The keys of all, by partition."""
    body = Body(Kind.ROSTER, terms, EVERYONE, data)
    texts = body.table(2 * KEY_BYTES + _signature(terms))
    body.end()
    return {
        key: Entry(key, text[:KEY_BYTES], text[KEY_BYTES : 2 * KEY_BYTES], text[2 * KEY_BYTES :])
        for key, text in texts.items()
    }


def shares(terms: Terms, partition: int, sealed: Mapping[int, bytes]) -> bytes:
    """One client's shares, sealed, by holder."""
    return frame(Kind.SHARES, terms, partition, table(sealed))


def read_shares(terms: Terms, partition: int, data: bytes) -> dict[int, bytes]:
    """The sealed shares of one client, by holder."""
    body = Body(Kind.SHARES, terms, partition, data)
    found = body.table(SEALED_BYTES)
    body.end()
    return found


def inbox(terms: Terms, partition: int, message: Inbox) -> bytes:
    """Phase 2's question to one client."""
    return frame(Kind.INBOX, terms, partition, ids(message.sharers), table(message.sealed))


def read_inbox(terms: Terms, partition: int, data: bytes) -> Inbox:
    """Phase 2's question."""
    body = Body(Kind.INBOX, terms, partition, data)
    found = Inbox(body.ids(), body.table(SEALED_BYTES))
    body.end()
    return found


def input_(terms: Terms, partition: int, signature: bytes, packed: bytes) -> bytes:
    """One client's masked input, and its signature on who shared."""
    return frame(Kind.INPUT, terms, partition, signature, packed)


def read_input(terms: Terms, partition: int, data: bytes) -> tuple[bytes, bytes]:
    """The signature and the packed input of one client."""
    body = Body(Kind.INPUT, terms, partition, data)
    found = body.take(_signature(terms)), body.take(packing.size_bytes(terms.words, terms.width))
    body.end()
    return found


def survivors(terms: Terms, partition: int, message: Survivors) -> bytes:
    """Phase 3's question to one client."""
    return frame(Kind.SURVIVORS, terms, partition, ids(message.survivors), table(message.signatures))


def read_survivors(terms: Terms, partition: int, data: bytes) -> Survivors:
    """Phase 3's question."""
    body = Body(Kind.SURVIVORS, terms, partition, data)
    found = Survivors(body.ids(), body.table(_signature(terms)))
    body.end()
    return found


def confirmation(terms: Terms, partition: int, signature: bytes) -> bytes:
    """One client's signature on who survived."""
    return frame(Kind.CONFIRMATION, terms, partition, signature)


def read_confirmation(terms: Terms, partition: int, data: bytes) -> bytes:
    """The signature of one client on who survived."""
    body = Body(Kind.CONFIRMATION, terms, partition, data)
    signature = body.take(_signature(terms))
    body.end()
    return signature


def request(terms: Terms, partition: int, message: Request) -> bytes:
    """Phase 4's question to one client."""
    parts = ids(message.active), ids(message.dropped), table(message.signatures)
    return frame(Kind.REQUEST, terms, partition, *parts)


def read_request(terms: Terms, partition: int, data: bytes) -> Request:
    """Phase 4's question."""
    body = Body(Kind.REQUEST, terms, partition, data)
    found = Request(body.ids(), body.ids(), body.table(_signature(terms)))
    body.end()
    return found


def opening(terms: Terms, partition: int, message: Opening) -> bytes:
    """One client's answer in phase 4."""
    return frame(Kind.OPENING, terms, partition, table(message.seeds), table(message.keys))


def read_opening(terms: Terms, partition: int, data: bytes) -> Opening:
    """The answer of one client in phase 4."""
    body = Body(Kind.OPENING, terms, partition, data)
    found = Opening(body.table(SHARE_BYTES), body.table(SHARE_BYTES))
    body.end()
    return found


def _signature(terms: Terms) -> int:
    return SIGNATURE_BYTES if terms.signed else 0
