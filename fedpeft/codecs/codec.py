"""What a codec is: tensors of a known specification to bytes, and back."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np

from fedpeft.adapters import AdapterSpec, Tensors


class Encode(Protocol):
    """`random` is where rounding is drawn from; a codec that draws nothing needs none."""

    def __call__(self, tensors: Tensors, spec: AdapterSpec, random: np.random.Generator | None = None) -> bytes:
        """The bytes from which `decode` makes `tensors`, or what comes near them."""
        ...


class Codec(NamedTuple):
    """`encode(tensors, spec, random) -> bytes` and `decode(bytes, spec) -> tensors`.

    The specification gives names, shapes and order, so nothing of it travels and nothing that arrives can
    contradict it. `size(spec)` bounds the encoded length in bytes. Traits:

    - `additive`: the bytes of a sum follow from the bytes of its terms;
    - `expands_norm`: what is decoded may be longer than what was asked to be sent;
    - `exact`: what is decoded is what was encoded, to the bit;
    - `contracts`: what is lost is shorter than what was encoded, on average over `random`;
    - `remembers`: what was lost of one update is added to the client's next one.
    """

    encode: Encode
    decode: Callable[[bytes, AdapterSpec], Tensors]
    size: Callable[[AdapterSpec], int]
    additive: bool
    expands_norm: bool
    exact: bool = True
    contracts: bool = True
    remembers: bool = False
