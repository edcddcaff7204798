"""Integers of any width up to 62 bits, side by side without a gap, and the word that each is held in."""

from __future__ import annotations

import numpy as np

from fedpeft.errors import PacketError, sentence

_LANES = 64
_BLOCK = _LANES * 2**14


def word(width: int) -> np.dtype[np.unsignedinteger]:
    """The type that integers of `width` bits are summed in: it wraps at a multiple of 2^`width`."""
    return np.dtype("<u4") if width <= 32 else np.dtype("<u8")


def top(width: int) -> int:
    """The greatest integer of `width` bits."""
    return (1 << width) - 1


def size_bytes(count: int, width: int) -> int:
    """How many bytes `count` integers of `width` bits take."""
    return -(-count * width // 8)


def pack(values: np.ndarray, width: int) -> bytes:
    """The lowest `width` bits of each of `values` `(count,)`, least significant first, padded by zeros to a byte."""
    blocks = (_pack_block(values[at : at + _BLOCK], width) for at in range(0, len(values), _BLOCK))
    return b"".join(blocks)[: size_bytes(len(values), width)]


def unpack(data: bytes, count: int, width: int) -> np.ndarray:
    """The `count` integers that `pack` packed, as `word(width)`.

    Raises:
        PacketError: another number of bytes than they take, or a bit set after the last.
    """
    if len(data) != size_bytes(count, width):
        raise _unreadable(f"{size_bytes(count, width)} bytes for {count} integers of {width} bits", str(len(data)))
    used = count * width % 8
    if used and data[-1] >> used:
        raise _unreadable("zeros after the last integer", "a bit that is set")
    found = np.empty(count, word(width))
    for at in range(0, count, _BLOCK):
        block = found[at : at + _BLOCK]
        # A block's integers fill whole bytes, as there are 64 times something of them.
        start = at * width // 8
        block[:] = _unpack_block(data[start : start + size_bytes(len(block), width)], len(block), width)
    return found


def _pack_block(values: np.ndarray, width: int) -> bytes:
    groups = -(-len(values) // _LANES)
    padded = np.zeros(groups * _LANES, np.uint64)
    padded[: len(values)] = values
    padded &= np.uint64(top(width))
    lanes = np.ascontiguousarray(padded.reshape(groups, _LANES).T)
    packed = np.zeros((width, groups), np.uint64)
    for lane, at, shift in _places(width):
        packed[at] |= lanes[lane] << np.uint64(shift)
        if shift + width > 64:
            packed[at + 1] |= lanes[lane] >> np.uint64(64 - shift)
    return packed.T.astype("<u8").tobytes()


def _unpack_block(data: bytes, count: int, width: int) -> np.ndarray:
    groups = -(-count // _LANES)
    padded = np.frombuffer(data.ljust(groups * width * 8, b"\0"), "<u8")
    packed = np.ascontiguousarray(padded.reshape(groups, width).T)
    lanes = np.empty((_LANES, groups), np.uint64)
    for lane, at, shift in _places(width):
        lanes[lane] = packed[at] >> np.uint64(shift)
        if shift + width > 64:
            lanes[lane] |= packed[at + 1] << np.uint64(64 - shift)
    return (lanes.T & np.uint64(top(width))).reshape(-1)[:count]


def _places(width: int) -> list[tuple[int, int, int]]:
    """Of 64 integers in `width` words of 64 bits: the number of each, the word it begins in, and at which bit."""
    return [(lane, *divmod(lane * width, 64)) for lane in range(_LANES)]


def _unreadable(expected: str, found: str) -> PacketError:
    remedy = "run the same version and settings on both sides"
    return PacketError(sentence("packed integers", expected=expected, found=found, remedy=remedy))
