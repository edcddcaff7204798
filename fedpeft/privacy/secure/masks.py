"""Masks: streams of AES-256 in counter mode, one for each key, read as integers modulo 2^w."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes

from fedpeft.privacy.secure.packing import top, word

_CHUNK_BYTES = 2**18
_BLOCK_BYTES = 16


def summed(count: int, width: int, added: Iterable[bytes], taken: Iterable[bytes] = ()) -> np.ndarray:
    """Σ streams of the keys `added` − Σ streams of the keys `taken`, modulo 2^`width`: `(count,)` of `word(width)`.

    A key is 32 bytes and serves one stream only, so the counter starts at 0. Time is linear in the number of keys,
    memory is that of one sum.
    """
    kind = word(width)
    total = np.zeros(count, kind)
    plus, minus = ([_stream(key) for key in keys] for keys in (added, taken))
    step, zeros = _CHUNK_BYTES // kind.itemsize, bytes(_CHUNK_BYTES)
    buffer = bytearray(_CHUNK_BYTES + _BLOCK_BYTES)
    found = np.frombuffer(buffer, kind, step)
    for start in range(0, count, step):
        part = total[start : start + step]
        for streams, combine in ((plus, np.add), (minus, np.subtract)):
            for stream in streams:
                stream.update_into(zeros, buffer)
                combine(part, found[: len(part)], out=part)
    total &= kind.type(top(width))
    return total


def _stream(key: bytes) -> CipherContext:
    return Cipher(algorithms.AES256(key), modes.CTR(bytes(_BLOCK_BYTES))).encryptor()
