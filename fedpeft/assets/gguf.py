"""GGUF files: the fields, and the tensors as float32.

Source: the format's description in ggml, `docs/gguf.md`, version 3; the blocks are `block_q4_1` and `block_q8_0` of
its `ggml-common.h`. Only the kinds of tensor that our assets hold can be read.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class _Kind:
    """How one kind of tensor is stored: blocks of `values` numbers in `size` bytes each."""

    values: int
    size: int
    decode: Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class _Place:
    kind: _Kind
    shape: tuple[int, ...]
    offset: int


@dataclass(frozen=True)
class Gguf:
    """The fields of a file, and the names of its tensors."""

    fields: Mapping[str, Any]
    _data: memoryview
    _places: Mapping[str, _Place]

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors, in the file's order."""
        return tuple(self._places)

    def tensor(self, name: str) -> np.ndarray:
        """A tensor in float32, the slowest dimension first.

        Raises:
            KeyError: there is none of this name.
            ValueError: the file ends before the tensor does.
        """
        place = self._places[name]
        blocks = math.prod(place.shape) // place.kind.values
        raw = np.frombuffer(self._data, np.uint8, blocks * place.kind.size, place.offset)
        return place.kind.decode(raw.reshape(blocks, place.kind.size)).reshape(place.shape)


def read_gguf(data: bytes) -> Gguf:
    """What a GGUF file of version 3 holds.

    Raises:
        ValueError: it is not such a file, is cut off, or holds a kind of tensor that is not known here.
    """
    if data[:8] != b"GGUF\x03\x00\x00\x00":
        raise ValueError("not a GGUF file of version 3")
    try:
        return _read(memoryview(data))
    except struct.error as error:
        raise ValueError(f"a GGUF file that is cut off: {error}") from error


def _read(data: memoryview) -> Gguf:
    cursor = _Cursor(data, 8)
    count, fields = cursor.number("<Q"), {}
    for _ in range(cursor.number("<Q")):
        name = cursor.text()
        fields[name] = cursor.value(cursor.number("<I"))
    places = {}
    for _ in range(count):
        name = cursor.text()
        fast_first = [cursor.number("<Q") for _ in range(cursor.number("<I"))]
        kind = cursor.number("<I")
        if kind not in _KINDS:
            raise ValueError(f"tensor {name} is of kind {kind}; known are {', '.join(map(str, _KINDS))}")
        places[name] = _Place(_KINDS[kind], tuple(reversed(fast_first)), cursor.number("<Q"))
    align = fields.get("general.alignment", 32)
    start = -(-cursor.at // align) * align
    return Gguf(fields, data[start:], places)


class _Cursor:
    def __init__(self, data: memoryview, at: int) -> None:
        self._data, self.at = data, at

    def number(self, form: str) -> Any:
        (value,) = struct.unpack_from(form, self._data, self.at)
        self.at += struct.calcsize(form)
        return value

    def text(self) -> str:
        size = self.number("<Q")
        self.at += size
        return bytes(self._data[self.at - size : self.at]).decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            each = self.number("<I")
            return [self.value(each) for _ in range(self.number("<Q"))]
        return self.number(_SCALARS[kind])


def _scale(blocks: np.ndarray, at: int) -> np.ndarray:
    return np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2").astype(np.float32)


def _plain(blocks: np.ndarray) -> np.ndarray:
    return blocks.reshape(-1).view("<f4").copy()


def _q4_1(blocks: np.ndarray) -> np.ndarray:
    numbers = np.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], axis=1)
    values: np.ndarray = numbers.astype(np.float32) * _scale(blocks, 0) + _scale(blocks, 2)
    return values


def _q8_0(blocks: np.ndarray) -> np.ndarray:
    values: np.ndarray = np.ascontiguousarray(blocks[:, 2:]).view(np.int8).astype(np.float32) * _scale(blocks, 0)
    return values


_KINDS = {0: _Kind(1, 4, _plain), 3: _Kind(32, 20, _q4_1), 8: _Kind(32, 34, _q8_0)}
