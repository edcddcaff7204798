"""What a codec is: tensors of a known specification to bytes, and back."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from fedpeft.adapters import AdapterSpec, Tensors


class Codec(NamedTuple):
    """`encode(tensors, spec) -> bytes` and `decode(bytes, spec) -> tensors`.

    The specification gives names, shapes and order, so nothing of it travels and nothing that arrives can
    contradict it. `additive`: the bytes of a sum follow from the bytes of its terms. `expands_norm`: what is
    decoded may be longer than what was encoded. `size(spec)` bounds the encoded length in bytes.
    """

    encode: Callable[[Tensors, AdapterSpec], bytes]
    decode: Callable[[bytes, AdapterSpec], Tensors]
    size: Callable[[AdapterSpec], int]
    additive: bool
    expands_norm: bool
