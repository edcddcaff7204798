"""Random bytes: from the operating system where they protect somebody, from a seed where a test must repeat."""

from __future__ import annotations

import os
from collections.abc import Callable

import numpy as np

Entropy = Callable[[int], bytes]
"""`entropy(count)`: so many independent uniform bytes, such as `os.urandom` or a NumPy generator's `bytes`."""

SYSTEM: Entropy = os.urandom


def words(entropy: Entropy, count: int) -> np.ndarray:
    """So many uniform 64-bit words, uint64."""
    return np.frombuffer(entropy(8 * count), "<u8")


def below(entropy: Entropy, bound: int) -> int:
    """An integer from 0 up to but not including `bound`, exactly uniform: numbers that are too great are redrawn."""
    bits = (bound - 1).bit_length()
    count, spare = -(-bits // 8), -bits % 8
    while True:
        found = int.from_bytes(entropy(count), "little") >> spare
        if found < bound:
            return found
