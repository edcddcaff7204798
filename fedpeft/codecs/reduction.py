"""Fewer numbers: the greatest alone, or thinner factors of each matrix."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from fedpeft.adapters import Tensors
from fedpeft.codecs.packing import pack_places, places_bytes, unpack_places

Shapes = Mapping[str, tuple[int, ...]]


class Reduction(NamedTuple):
    """`encode(tensors, shapes) -> (bytes, values)` and `decode(bytes, values, shapes) -> tensors`.

    `sizes(shapes)` are how many bytes and how many values there are, which the shapes alone decide. `faithful`: an
    error of the values is the same error of the tensors. `exact`: nothing is left out. Nothing is ever made longer
    than it was.
    """

    encode: Callable[[Tensors, Shapes], tuple[bytes, np.ndarray]]
    decode: Callable[[bytes, np.ndarray, Shapes], Tensors]
    sizes: Callable[[Shapes], tuple[int, int]]
    faithful: bool
    exact: bool


def everything() -> Reduction:
    """Every number, one tensor after another."""
    return Reduction(
        lambda tensors, shapes: (b"", _flat(tensors, shapes)),
        lambda data, values, shapes: _apart(values, shapes),  # noqa: ARG005
        lambda shapes: (0, _count(shapes)),
        faithful=True,
        exact=True,
    )


def top_k(share: float) -> Reduction:
    """The greatest `share` of all numbers by magnitude, at least one, of equal ones the first; the others are 0.

    What is lost is at most 1 − share of the squared length.

    Source: Stich et al. 2018, "Sparsified SGD with Memory", definition 2.1.
    """

    def kept(shapes: Shapes) -> int:
        count = _count(shapes)
        return min(count, max(1, math.ceil(share * count)))

    def encode(tensors: Tensors, shapes: Shapes) -> tuple[bytes, np.ndarray]:
        values = _flat(tensors, shapes)
        places = _greatest(np.abs(values), kept(shapes))
        return pack_places(places, len(values)), values[places]

    def decode(data: bytes, values: np.ndarray, shapes: Shapes) -> Tensors:
        whole = np.zeros(_count(shapes), np.float32)
        whole[unpack_places(data, len(values), len(whole))] = values
        return _apart(whole, shapes)

    return Reduction(
        encode,
        decode,
        lambda shapes: (places_bytes(kept(shapes), _count(shapes)), kept(shapes)),
        faithful=True,
        exact=share == 1,
    )


def low_rank(rank: int) -> Reduction:
    """The nearest matrix of `rank` in place of each matrix, as two factors, where those are fewer numbers.

    The factors are U √S and √S Vᵀ of the singular value decomposition. Tensors that are no matrices, and those that
    gain nothing, stay whole.

    Source: Vogels et al. 2019, "PowerSGD", section 3; decomposed exactly here, since a factor of an adapter is thin.
    """

    def thin(shape: tuple[int, ...]) -> bool:
        return len(shape) == 2 and rank * sum(shape) < math.prod(shape)

    def parts(shapes: Shapes) -> Shapes:
        found: dict[str, tuple[int, ...]] = {}
        for key, shape in shapes.items():
            sides = {f"{key}.P": (shape[0], rank), f"{key}.Q": (rank, shape[1])} if thin(shape) else {key: shape}
            found.update(sides)
        return found

    def encode(tensors: Tensors, shapes: Shapes) -> tuple[bytes, np.ndarray]:
        found: dict[str, np.ndarray] = {}
        for key, shape in shapes.items():
            found[key] = tensors[key]
            if thin(shape):
                u, s, vt = np.linalg.svd(tensors[key].astype(np.float64), full_matrices=False)
                root = np.sqrt(s[:rank])
                found[f"{key}.P"], found[f"{key}.Q"] = u[:, :rank] * root, root[:, None] * vt[:rank]
        return b"", _flat(found, parts(shapes))

    def decode(data: bytes, values: np.ndarray, shapes: Shapes) -> Tensors:  # noqa: ARG001
        found = _apart(values, parts(shapes))
        with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is refused by whoever decodes
            return {
                key: found[f"{key}.P"] @ found[f"{key}.Q"] if thin(shape) else found[key]
                for key, shape in shapes.items()
            }

    return Reduction(encode, decode, lambda shapes: (0, _count(parts(shapes))), faithful=False, exact=False)


def _greatest(magnitudes: np.ndarray, kept: int) -> np.ndarray:
    """The places of the `kept` greatest, ascending; of equal ones the first, so that every machine takes the same."""
    if kept == len(magnitudes):
        return np.arange(kept)
    least = np.partition(magnitudes, -kept)[-kept]
    above = np.flatnonzero(magnitudes > least)
    equal = np.flatnonzero(magnitudes == least)[: kept - len(above)]
    return np.sort(np.concatenate([above, equal]))


def _count(shapes: Shapes) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


def _flat(tensors: Tensors, shapes: Shapes) -> np.ndarray:
    """The numbers of all tensors in order of `shapes`, float32."""
    return np.concatenate([np.zeros(0, np.float32), *(np.ravel(tensors[key]).astype(np.float32) for key in shapes)])


def _apart(values: np.ndarray, shapes: Shapes) -> dict[str, np.ndarray]:
    """The inverse of `_flat`."""
    found: dict[str, np.ndarray] = {}
    at = 0
    for key, shape in shapes.items():
        size = math.prod(shape)
        found[key], at = values[at : at + size].reshape(shape).copy(), at + size
    return found
