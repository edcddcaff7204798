"""What travels in the two passes of a sketch: adapters as the sums of a round show them, and back.

The first pass carries a sketch of what each low-rank module does and the deltas of all other tensors, the second the
products themselves, projected. Both have the same shapes at every rank, so that ranks stay hidden.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from fedpeft.adapters import (
    AdapterSpec,
    AdapterState,
    Factors,
    ModuleSpec,
    Tensors,
    at_ranks,
    factors,
    low_rank_modules,
    norm,
)
from fedpeft.errors import AdapterError, sentence
from fedpeft.merges import products, sketch
from fedpeft.updates import Update

_ORTHONORMAL = 1e-3
"""How far QᵀQ of a basis in float32 may be from the identity."""


class Passes(NamedTuple):
    """How a round's products are summed: `shared` is what clients train, at the server's ranks.

    `width` is how many columns each sketch has, as `sketch.width_of` reads it; `seed` and `round` are what their
    directions are drawn from.
    """

    shared: AdapterSpec
    width: int
    seed: int
    round: int

    @property
    def modules(self) -> tuple[ModuleSpec, ...]:
        """The modules whose products are summed."""
        return low_rank_modules(self.shared)

    @property
    def paths(self) -> tuple[str, ...]:
        """The paths of those modules."""
        return tuple(module.path for module in self.modules)

    @property
    def first(self) -> AdapterSpec:
        """What is sent in the first pass: `Y` `(out, width)` of each module, and all that is in no such module."""
        sketched = self._of(lambda outputs, inputs, width: ("Y", (outputs, width)))  # noqa: ARG005
        return replace(self.shared, modules=(*sketched.modules, *self._beside.modules))

    @property
    def bases(self) -> AdapterSpec:
        """What clients are told before the second pass: `Q` `(out, width)` of each module."""
        return self._of(lambda outputs, inputs, width: ("Q", (outputs, width)))  # noqa: ARG005

    @property
    def second(self) -> AdapterSpec:
        """What is sent in the second pass: `Z` `(width, in)` of each module."""
        return self._of(lambda outputs, inputs, width: ("Z", (width, inputs)))  # noqa: ARG005

    @property
    def _beside(self) -> AdapterSpec:
        inside = {f"{module.path}.{name}" for module in self.modules for name, _ in module.shapes}
        return self.shared.only(key for key in self.shared.shapes if key not in inside)

    def _of(self, shape: Callable[[int, int, int], tuple[str, tuple[int, int]]]) -> AdapterSpec:
        found = []
        for module in self.modules:
            outputs, inputs = _sides(module)
            named = shape(outputs, inputs, self.columns(module))
            found.append(replace(module, kind="full", rank=0, shapes=(named,)))
        return replace(self.shared, modules=tuple(found))

    def columns(self, module: ModuleSpec) -> int:
        """The columns of a module's sketch."""
        return sketch.width_of(self.width, module.rank, _sides(module))


class Lent(NamedTuple):
    """What a client lends to the two sums: the tensors of `Passes.first`, and for the second its products by path.

    Together they were of length `size`, and are no longer than was allowed.
    """

    tensors: Tensors
    products: Mapping[str, Factors]
    size: float


def lend(passes: Passes, update: Update, received: AdapterState, most: float) -> Lent:
    """What a client lends that made `update` of `received`, both at its own ranks; no longer than `most`.

    The length is that of the products after training and of all other deltas, as one vector.
    """
    made = {module.path: factors(module, received.tensors, update.delta) for module in low_rank_modules(update.spec)}
    beside = {key: update.delta[key] for key in passes._beside.shapes}
    size = math.hypot(norm(beside), *(products.frobenius(one) for one in made.values()))
    by = 1.0 if size <= most else most / size
    made = {path: products.scaled(one, by) for path, one in made.items()}
    sent = {key: (by * value).astype(np.float64) for key, value in beside.items()}
    for module in passes.modules:
        inputs, width = _sides(module)[1], passes.columns(module)
        omega = sketch.directions(passes.seed, passes.round, module.path, inputs, width)
        sent[f"{module.path}.Y"] = sketch.first(made[module.path], omega)
    return Lent(sent, made, size)


def bases_of(passes: Passes, mean: Tensors) -> dict[str, np.ndarray]:
    """The tensors of `Passes.bases`, float32, of the mean of what came in the first pass."""
    return {f"{m.path}.Q": sketch.basis(mean[f"{m.path}.Y"]).astype(np.float32) for m in passes.modules}


def require_bases(passes: Passes, bases: Tensors, place: str) -> None:
    """Raises AdapterError unless `bases` have orthonormal columns, so that nothing grows by being projected."""
    passes.bases.require(bases, place)
    for key, value in bases.items():
        q = value.astype(np.float64)
        found = float(np.abs(q.T @ q - np.eye(q.shape[1])).max())
        if found > _ORTHONORMAL:
            expected, remedy = "orthonormal columns", "leave the round, and ask who runs the server"
            told = f"columns that are {found:.2g} from that"
            raise AdapterError(sentence(f"{place}, tensor {key}", expected=expected, found=told, remedy=remedy))


def project(passes: Passes, made: Mapping[str, Factors], bases: Tensors) -> dict[str, np.ndarray]:
    """The tensors of `Passes.second` of a client whose products are `made`."""
    return {f"{m.path}.Z": sketch.second(made[m.path], bases[f"{m.path}.Q"]) for m in passes.modules}


def joined(passes: Passes, mean: Tensors, bases: Tensors, projected: Tensors) -> tuple[AdapterState, dict[str, float]]:
    """The mean of the round as an adapter, and how much of each module's product it lacks, by path, in norms.

    `mean` is that of the first sum and `projected` that of the second; ranks are the sketch's widths, and tensors
    beside products are deltas.
    """
    found = {key: np.asarray(mean[key], np.float32) for key in passes._beside.shapes}
    lacks = {}
    for module in passes.modules:
        path = module.path
        found |= {f"{path}.A": np.asarray(projected[f"{path}.Z"], np.float32), f"{path}.B": bases[f"{path}.Q"]}
        lacks[path] = sketch.lost(mean[f"{path}.Y"], _sides(module)[1])
    ranks = {module.path: passes.columns(module) for module in passes.modules}
    return AdapterState(at_ranks(passes.shared, ranks), found), lacks


def _sides(module: ModuleSpec) -> tuple[int, int]:
    """(out, in) of a low-rank module."""
    shapes = dict(module.shapes)
    return shapes["B"][0], shapes["A"][1]
