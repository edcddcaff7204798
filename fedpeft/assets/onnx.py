"""The weights of an ONNX file, and the nodes that use them.

Only what our assets need of the protocol buffers is read here: `onnx.proto`'s `ModelProto.graph`, its nodes with
their inputs, and its initialisers in float32 and raw bytes.

Source: the protocol buffers' encoding (varints, and fields with a length), and `onnx/onnx.proto`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

_GRAPH = 7
_NODE, _INITIALIZER = 1, 5
_INPUT, _NODE_NAME, _OPERATOR = 1, 3, 4
_DIMENSIONS, _DATA_TYPE, _TENSOR_NAME, _RAW = 1, 2, 8, 9
_FLOAT = 1
_VARINT, _EIGHT_BYTES, _BYTES, _FOUR_BYTES = 0, 1, 2, 5


@dataclass(frozen=True)
class Node:
    """One operation: its name and kind, and the names of what goes into it."""

    name: str
    operator: str
    inputs: tuple[str, ...]


@dataclass(frozen=True)
class Graph:
    """The nodes in their order, and the weights in float32 by name."""

    nodes: tuple[Node, ...]
    weights: Mapping[str, np.ndarray]


def read_onnx(data: bytes) -> Graph:
    """The graph of an ONNX model.

    Raises:
        KeyError: the file holds no graph.
        ValueError: it is cut off or is no ONNX file; or a weight is not in float32 and raw bytes.
    """
    graphs = [_as_bytes(value) for number, value in _fields(memoryview(data)) if number == _GRAPH]
    if not graphs:
        raise KeyError("a graph")
    parts = [(number, _as_bytes(value)) for number, value in _fields(graphs[0]) if number in (_NODE, _INITIALIZER)]
    return Graph(
        tuple(_node(value) for number, value in parts if number == _NODE),
        dict(_weight(value) for number, value in parts if number == _INITIALIZER),
    )


def _node(data: memoryview) -> Node:
    fields = list(_fields(data))

    def texts(wanted: int) -> tuple[str, ...]:
        return tuple(bytes(_as_bytes(value)).decode() for number, value in fields if number == wanted)

    return Node("".join(texts(_NODE_NAME)), "".join(texts(_OPERATOR)), texts(_INPUT))


def _weight(data: memoryview) -> tuple[str, np.ndarray]:
    shape: list[int] = []
    single: dict[int, int | memoryview] = {}
    for number, value in _fields(data):
        if number == _DIMENSIONS:
            shape += [value] if isinstance(value, int) else _varints(value)
        else:
            single[number] = value
    name = bytes(_as_bytes(single[_TENSOR_NAME])).decode()
    if single.get(_DATA_TYPE) != _FLOAT or _RAW not in single:
        raise ValueError(f"weight {name} is not in float32 and raw bytes")
    return name, np.frombuffer(_as_bytes(single[_RAW]), "<f4").reshape(shape)


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Number and value of each field of a message; values of a fixed width come as bytes."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, wire = key >> 3, key & 7
        if wire == _VARINT:
            value, at = _varint(data, at)
            yield number, value
            continue
        if wire == _BYTES:
            size, at = _varint(data, at)
        elif wire in (_EIGHT_BYTES, _FOUR_BYTES):
            size = 8 if wire == _EIGHT_BYTES else 4
        else:
            raise ValueError(f"not a protocol buffer: wire type {wire}")
        if at + size > len(data):
            raise ValueError("a protocol buffer that is cut off")
        yield number, data[at : at + size]
        at += size


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= len(data):
            raise ValueError("a protocol buffer that is cut off")
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at


def _varints(data: memoryview) -> list[int]:
    values, at = [], 0
    while at < len(data):
        value, at = _varint(data, at)
        values.append(value)
    return values


def _as_bytes(value: int | memoryview) -> memoryview:
    if isinstance(value, int):
        raise ValueError("not an ONNX file: a number where bytes belong")
    return value
