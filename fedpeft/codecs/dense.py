"""The dense codec: every number in float32, little-endian, one tensor after another."""

from __future__ import annotations

import numpy as np

from fedpeft.adapters import AdapterSpec, Tensors
from fedpeft.codecs.codec import Codec
from fedpeft.errors import PacketError, sentence

_FLOAT = np.dtype("<f4")


def dense() -> Codec:
    """A codec that changes no bit: 4 bytes a parameter, no header."""
    return Codec(_encode, _decode, _size, additive=True, expands_norm=False)


def _encode(tensors: Tensors, spec: AdapterSpec, random: np.random.Generator | None = None) -> bytes:  # noqa: ARG001
    return b"".join(np.ascontiguousarray(tensors[key], _FLOAT).tobytes() for key in spec.shapes)


def _decode(data: bytes, spec: AdapterSpec) -> Tensors:
    expected = _size(spec)
    if len(data) != expected:
        raise PacketError(
            sentence(
                "dense payload",
                expected=f"{expected} bytes for {spec.parameters} parameters",
                found=f"{len(data)} bytes",
                remedy="use the same adapter settings on both sides",
            )
        )
    flat = np.frombuffer(data, _FLOAT)
    tensors, offset = {}, 0
    for key, shape in spec.shapes.items():
        size = int(np.prod(shape))
        tensors[key] = flat[offset : offset + size].reshape(shape).astype(np.float32)
        offset += size
    return tensors


def _size(spec: AdapterSpec) -> int:
    return spec.parameters * _FLOAT.itemsize
