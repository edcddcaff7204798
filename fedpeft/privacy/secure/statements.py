"""What nodes sign and secrets are bound to: each a text of its own kind, about one session."""

from __future__ import annotations

import hashlib
from collections.abc import Collection

from fedpeft.privacy.secure.framing import ids
from fedpeft.privacy.secure.messages import Entry
from fedpeft.privacy.secure.terms import Terms


def context(terms: Terms, roster: bytes) -> bytes:
    """32 bytes that stand for the session and the roster, as the message that all were sent."""
    return hashlib.sha256(b"roster" + terms.session + roster).digest()


def keys(terms: Terms, entry: Entry) -> bytes:
    """That these are the public keys of a partition."""
    return _statement(b"keys", terms.session, ids([entry.partition]), entry.sealing, entry.masking)


def sharers(terms: Terms, roster: bytes, who: Collection[int]) -> bytes:
    """That these have shared their secrets; `roster` is its `context`."""
    return _statement(b"sharers", terms.session, roster, ids(who))


def survivors(terms: Terms, roster: bytes, shared: Collection[int], who: Collection[int]) -> bytes:
    """That of those who shared these have survived."""
    return _statement(b"survivors", terms.session, roster, ids(shared), ids(who))


def _statement(kind: bytes, *parts: bytes) -> bytes:
    # Every part has a length that the kind or its own beginning says, so no two statements are the same bytes.
    return b"fedpeft secure sum 1 " + kind + b"\0" + b"".join(parts)
