"""Small whole numbers as few bits: digits of one radix, several to a byte, and places in a row."""

from __future__ import annotations

import numpy as np

from fedpeft.errors import PacketError, sentence


def per_byte(radix: int) -> int:
    """How many digits of `radix`, which is at most 256, one byte holds: 8 of 2, 5 of 3, 4 of 4, 2 of 16."""
    digits = 1
    while radix ** (digits + 1) <= 256:
        digits += 1
    return digits


def packed_bytes(count: int, radix: int) -> int:
    """The bytes that `count` digits of `radix` take."""
    return -(-count // per_byte(radix))


def pack(digits: np.ndarray, radix: int) -> bytes:
    """The digits, each an integer from 0 to `radix` - 1, the first of each byte in its lowest place."""
    width = per_byte(radix)
    whole = np.zeros(packed_bytes(len(digits), radix) * width, np.uint8)
    whole[: len(digits)] = digits
    places = (radix ** np.arange(width)).astype(np.uint16)
    return (whole.reshape(-1, width).astype(np.uint16) @ places).astype(np.uint8).tobytes()


def unpack(data: bytes, count: int, radix: int) -> np.ndarray:
    """The `count` digits that were packed into `data`, which has `packed_bytes(count, radix)` bytes; uint8.

    Raises:
        PacketError: a byte that no digits make, or something after the last digit.
    """
    rows = np.frombuffer(data, np.uint8)[:, None].astype(np.uint16)
    places = (radix ** np.arange(per_byte(radix))).astype(np.uint16)
    digits = (rows // places % radix).astype(np.uint8).ravel()
    if digits[count:].any() or (rows >= radix ** per_byte(radix)).any():
        raise PacketError(
            sentence(
                "coded payload",
                expected=f"{count} digits of radix {radix} and zeros after them",
                found="other bits",
                remedy="correct the node",
            )
        )
    return digits[:count]


def places_bytes(kept: int, count: int) -> int:
    """The bytes that say which `kept` of `count` numbers are meant: a bit each, or a number for each that is."""
    return min(packed_bytes(count, 2), packed_bytes(kept * _width(count), 2))


def pack_places(places: np.ndarray, count: int) -> bytes:
    """Which of `count` numbers are meant; `places` ascend."""
    if _as_bitmap(len(places), count):
        marks = np.zeros(count, np.uint8)
        marks[places] = 1
        return pack(marks, 2)
    bits = places[:, None] >> np.arange(_width(count)) & 1
    return pack(bits.ravel().astype(np.uint8), 2)


def unpack_places(data: bytes, kept: int, count: int) -> np.ndarray:
    """The `kept` places below `count`, ascending; `data` has `places_bytes(kept, count)` bytes.

    Raises:
        PacketError: they are not as many, are out of range, or do not ascend.
    """
    if _as_bitmap(kept, count):
        places = np.flatnonzero(unpack(data, count, 2))
    else:
        bits = unpack(data, kept * _width(count), 2).reshape(kept, _width(count)).astype(np.int64)
        places = (bits << np.arange(_width(count))).sum(axis=1)
    if len(places) != kept or (kept and places[-1] >= count) or (np.diff(places) <= 0).any():
        raise PacketError(
            sentence(
                "coded payload",
                expected=f"{kept} places below {count} in ascending order",
                found="others",
                remedy="correct the node",
            )
        )
    return places


def _width(count: int) -> int:
    """The bits that a place below `count` takes."""
    return max(1, (count - 1).bit_length())


def _as_bitmap(kept: int, count: int) -> bool:
    return packed_bytes(count, 2) <= packed_bytes(kept * _width(count), 2)
