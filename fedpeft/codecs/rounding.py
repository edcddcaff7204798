"""Fewer bits a number: bfloat16, and equal steps between the least and the greatest of a block.

A block of numbers x travels as one step s and for each number a digit q, and is decoded as (q − h) s, with h half of
the greatest digit and h s the greatest |x| or little more. Rounded stochastically, the mean of what is decoded is x.
The step is a bfloat16, rounded up: a step too small would cut the greatest number off.

Source: Alistarh et al. 2017, "QSGD: Communication-Efficient SGD via Gradient Quantization and Encoding", section 3,
with the greatest magnitude of a block for its norm; with three levels Wen et al. 2017, "TernGrad", section 3.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from fedpeft.codecs.packing import pack, packed_bytes, unpack
from fedpeft.errors import PacketError, sentence

MOST = 2.0**126
"""The greatest magnitude that can be rounded: its step and what is decoded stay within float32."""

_FLOAT = np.dtype("<f4")
_HALF = np.dtype("<u2")
_INFINITE = 0x7F80
_UP = 1 + 2.0**-7
"""What rounding a step up makes it longer by at most."""


class Rounding(NamedTuple):
    """`encode(values, random) -> bytes`, `decode(bytes, count) -> values` and `size(count)`, the length in bytes.

    `error` bounds the mean of ‖decoded − values‖² / ‖values‖², 0 where nothing is lost.
    """

    encode: Callable[[np.ndarray, np.random.Generator | None], bytes]
    decode: Callable[[bytes, int], np.ndarray]
    size: Callable[[int], int]
    error: float


def float32() -> Rounding:
    """No rounding: 4 bytes a number."""
    return Rounding(
        lambda values, random: values.astype(_FLOAT).tobytes(),  # noqa: ARG005
        lambda data, count: np.frombuffer(data, _FLOAT, count).astype(np.float32),
        lambda count: count * _FLOAT.itemsize,
        0.0,
    )


def bf16() -> Rounding:
    """The nearest bfloat16, the even one of two: 2 bytes a number."""

    def encode(values: np.ndarray, random: np.random.Generator | None) -> bytes:  # noqa: ARG001
        bits = values.astype(np.float32).view(np.uint32)
        return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(_HALF).tobytes()

    def decode(data: bytes, count: int) -> np.ndarray:
        return _from_half(np.frombuffer(data, _HALF, count))

    return Rounding(encode, decode, lambda count: count * _HALF.itemsize, 2.0**-16)


def nearest(values: np.ndarray, random: np.random.Generator | None) -> np.ndarray:  # noqa: ARG001
    """The whole number nearest to each of `values`."""
    return np.floor(values + 0.5)


def stochastic(values: np.ndarray, random: np.random.Generator | None) -> np.ndarray:
    """One of the two whole numbers beside each of `values`, whose mean over `random` is the value.

    Raises:
        ValueError: there is nothing to draw from.
    """
    if random is None:
        raise ValueError("stochastic rounding needs a generator to draw from")
    drawn = random.random(values.shape)
    drawn += values
    return np.floor(drawn, out=drawn)


ROUNDINGS: Mapping[str, Callable[[np.ndarray, np.random.Generator | None], np.ndarray]] = {
    "stochastic": stochastic,
    "nearest": nearest,
}
"""How a number between two steps comes to one of them."""


def steps(levels: int, block: int, rounding: str) -> Rounding:
    """Numbers in blocks of `block`, each in one of `levels` steps; `rounding` is one of `ROUNDINGS`."""
    half, radix, to_whole = (levels - 1) / 2, _radix(levels), ROUNDINGS[rounding]

    def encode(values: np.ndarray, random: np.random.Generator | None) -> bytes:
        rows = _rows(values, block)
        step = _steps(rows, half)
        width = _from_half(step).astype(np.float64)[:, None]
        np.divide(rows, width, out=rows, where=width > 0)
        rows += half
        digits = to_whole(rows, random)
        np.clip(digits, 0, levels - 1, out=digits)
        return step.tobytes() + pack(digits.ravel()[: len(values)].astype(np.uint8), radix)

    def decode(data: bytes, count: int) -> np.ndarray:
        blocks = -(-count // block)
        step = np.frombuffer(data, _HALF, blocks)
        digits = unpack(data[blocks * _HALF.itemsize :], count, radix)
        if (step >= _INFINITE).any() or (digits >= levels).any():
            raise PacketError(
                sentence(
                    "coded payload",
                    expected=f"finite steps of at least 0 and digits below {levels}",
                    found="others",
                    remedy="correct the node",
                )
            )
        with np.errstate(over="ignore"):  # what is not finite is refused by whoever decodes
            values = digits.astype(np.float32) - np.float32(half)
            values *= np.repeat(_from_half(step), block)[:count]
            return values

    def size(count: int) -> int:
        return -(-count // block) * _HALF.itemsize + packed_bytes(count, radix)

    return Rounding(encode, decode, size, _error(half, block, rounding))


def _error(half: float, block: int, rounding: str) -> float:
    """A bound on the relative squared error: (s / 2)² for each of the block's numbers, of which one is h s.

    The nearest of steps among which 0 is one is never further from a number than 0 is, and close to the greatest.
    """
    bound = block * (_UP / (2 * half)) ** 2
    return min(bound, 1 - 0.5 / block) if rounding == "nearest" and half == int(half) else bound


def _radix(levels: int) -> int:
    """The radix of the digits: 3 for three levels, and else the power of two whose digits fill bytes."""
    return levels if levels == 3 else next(radix for radix in (2, 4, 16, 256) if radix >= levels)


def _rows(values: np.ndarray, block: int) -> np.ndarray:
    """The values in rows of `block`, float64, zeros after the last."""
    rows = np.zeros((-(-len(values) // block), block))
    rows.ravel()[: len(values)] = values
    return rows


def _steps(rows: np.ndarray, half: float) -> np.ndarray:
    """The step of each row as the bits of a bfloat16: the least with which half of the levels reach the greatest."""
    most = np.abs(rows).max(axis=1, initial=0.0)
    down = ((most / half).astype(np.float32).view(np.uint32) >> 16).astype(_HALF)
    found: np.ndarray = (down + (_from_half(down) * half < most)).astype(_HALF)
    return found


def _from_half(bits: np.ndarray) -> np.ndarray:
    """The float32 of each bfloat16."""
    return (bits.astype(np.uint32) << 16).view(np.float32)
