"""The form of all messages of a secure sum, and the checks at that door.

A message is 42 bytes of header (its kind, the session it belongs to, whom it is from or for) and a body of sets of
partitions, tables from partitions to strings of one length, and strings. A set is written in order and without
repetition, so a content has one form; nothing may follow. Sizes are known from the terms before anything is read.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Mapping
from enum import IntEnum
from itertools import pairwise

from fedpeft.errors import PacketError, sentence
from fedpeft.privacy.secure.terms import Terms

EVERYONE = 2**32 - 1
"""Whom a message is for that is the same for all."""

_HEADER = struct.Struct(">4sBB32sI")
_MAGIC, _VERSION = b"fpsa", 1
_COUNT = struct.Struct(">I")

HEADER_BYTES = _HEADER.size


class Kind(IntEnum):
    """What a message is."""

    INVITATION = 0
    KEYS = 1
    ROSTER = 2
    SHARES = 3
    INBOX = 4
    INPUT = 5
    SURVIVORS = 6
    CONFIRMATION = 7
    REQUEST = 8
    OPENING = 9


def kind_of(data: bytes) -> Kind:
    """What a message says it is.

    Raises:
        PacketError: it is none of ours.
    """
    if len(data) >= HEADER_BYTES:
        magic, version, kind, _, _ = _HEADER.unpack_from(data)
        if magic == _MAGIC and version == _VERSION and kind in set(Kind):
            return Kind(kind)
    raise unreadable("message of a secure sum", f"a header of version {_VERSION}", f"{data[:6].hex()!r}")


def ids(partitions: Collection[int]) -> bytes:
    """A set of partitions, in its one form."""
    return _COUNT.pack(len(partitions)) + b"".join(map(_COUNT.pack, sorted(partitions)))


def table(texts: Mapping[int, bytes]) -> bytes:
    """A table of strings of one length, by partition."""
    return ids(texts) + b"".join(texts[key] for key in sorted(texts))


def frame(kind: Kind, terms: Terms, partition: int, *parts: bytes) -> bytes:
    """A message of this session, from or for this partition."""
    return b"".join((_HEADER.pack(_MAGIC, _VERSION, kind, terms.session, partition), *parts))


class Body:
    """Reads a message from front to back; PacketError where it is not what the terms say."""

    def __init__(self, kind: Kind, terms: Terms, partition: int, data: bytes) -> None:
        whom = "everybody" if partition == EVERYONE else f"partition {partition}"
        self._place, self._data, self._at = f"{kind.name.lower()} of {whom}", memoryview(data), HEADER_BYTES
        self._most = terms.clients
        if kind_of(data) != kind or data[:HEADER_BYTES] != frame(kind, terms, partition):
            found = f"{kind_of(data).name.lower()} of another session or for another partition"
            raise unreadable(self._place, f"round {terms.round} of run {terms.run}", found)

    def take(self, count: int) -> bytes:
        """The next `count` bytes."""
        left = len(self._data) - self._at
        if count > left:
            raise unreadable(self._place, f"{count} more bytes", str(left))
        self._at += count
        return bytes(self._data[self._at - count : self._at])

    def ids(self) -> tuple[int, ...]:
        """A set of partitions, no more than are invited."""
        (count,) = _COUNT.unpack(self.take(_COUNT.size))
        if count > self._most:
            raise unreadable(self._place, f"at most {self._most} partitions", str(count))
        found = tuple(one for (one,) in _COUNT.iter_unpack(self.take(count * _COUNT.size)))
        if any(one >= other for one, other in pairwise(found)) or EVERYONE in found[-1:]:
            raise unreadable(self._place, "partitions in order, each once", "others")
        return found

    def table(self, size: int) -> dict[int, bytes]:
        """A table of strings of `size` bytes."""
        keys_ = self.ids()
        texts = self.take(len(keys_) * size)
        return {key: texts[at * size : (at + 1) * size] for at, key in enumerate(keys_)}

    def end(self) -> None:
        """Raises PacketError if anything is left."""
        if self._at != len(self._data):
            raise unreadable(self._place, "nothing more", f"{len(self._data) - self._at} bytes")


def unreadable(place: str, expected: str, found: str) -> PacketError:
    """Why a message cannot be read."""
    remedy = "run the same version and settings on both sides"
    return PacketError(sentence(place, expected=expected, found=found, remedy=remedy))
