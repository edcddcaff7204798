"""Low-rank modules: which axes are the rank, how an adapter is cut or padded to another, and what it does.

A node of rank r holds the leading r rows of A and columns of B. Cutting is lossy unless what is cut is zero;
padding with zeros is not, because a product does not see rows of A that meet columns of zeros in B.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from fedpeft.adapters.spec import AdapterSpec, AdapterState, ModuleSpec, Tensors

RANK_AXES: Mapping[str, Mapping[str, tuple[int, ...]]] = {
    "lora": {"A": (0,), "B": (1,)},
    "lora_sb": {"A": (0,), "B": (1,), "R": (0, 1)},
}
"""The axes of each tensor that count the rank, by kind of module. They are named, never guessed from sizes."""


FIXED: Mapping[str, tuple[str, ...]] = {"lora_sb": ("A", "B")}
"""The tensors of a kind that nobody ever trains."""


class Factors(NamedTuple):
    """A product in factored form, float64: B `(..., out, rank)` and A `(..., rank, in)`."""

    b: np.ndarray
    a: np.ndarray

    @property
    def rank(self) -> int:
        """Columns of B and rows of A."""
        return int(self.a.shape[-2])

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the product."""
        return int(self.b.shape[-2]), int(self.a.shape[-1])


_PRODUCTS: Mapping[str, Callable[[Callable[[str], np.ndarray]], Factors]] = {
    "lora": lambda tensor: Factors(tensor("B"), tensor("A")),
    "lora_sb": lambda tensor: Factors(tensor("B") @ tensor("R"), tensor("A")),
}


def low_rank_modules(spec: AdapterSpec) -> tuple[ModuleSpec, ...]:
    """The modules whose change of the weight is a product of two matrices, all tensors of it in `spec`."""
    found = (module for module in spec.modules if module.kind in RANK_AXES)
    return tuple(
        module
        for module in found
        if {name for name, _ in module.shapes} == set(RANK_AXES[module.kind])
        and all(len(shape) == 2 for _, shape in module.shapes)
    )


def fixed(spec: AdapterSpec) -> tuple[str, ...]:
    """The keys of the tensors that nobody ever trains."""
    return tuple(f"{m.path}.{name}" for m in spec.modules for name, _ in m.shapes if name in FIXED.get(m.kind, ()))


def factors(module: ModuleSpec, tensors: Tensors, delta: Tensors | None = None) -> Factors:
    """What a module adds to its weight, in float64, after `delta`, which may lack a tensor that does not move."""
    moved = delta or {}

    def tensor(name: str) -> np.ndarray:
        key = f"{module.path}.{name}"
        return np.add(tensors[key], moved.get(key, 0.0), dtype=np.float64)

    return _PRODUCTS[module.kind](tensor)


def at_rank(spec: AdapterSpec, rank: int) -> AdapterSpec:
    """`spec` as a node of rank `rank` holds it: no module's rank is above it (0 leaves all as they are)."""
    return at_ranks(spec, {m.path: min(m.rank, rank) for m in spec.modules}) if rank else spec


def at_ranks(spec: AdapterSpec, ranks: Mapping[str, int]) -> AdapterSpec:
    """`spec` with the low-rank modules that `ranks` names, by path, at other ranks."""
    return replace(spec, modules=tuple(_at(module, ranks.get(module.path, module.rank)) for module in spec.modules))


def greatest_rank(spec: AdapterSpec) -> int:
    """The greatest rank of a module; 0 where none has one."""
    return max((module.rank for module in spec.modules), default=0)


def resized(tensors: Tensors, spec: AdapterSpec) -> dict[str, np.ndarray]:
    """The tensors of `spec` cut, or padded with zeros, to its shapes; what is kept is the leading corner."""
    return {key: fit(tensors[key], shape) for key, shape in spec.shapes.items()}


def absorbed(adapter: AdapterState) -> AdapterState:
    """One adapter that does what `adapter` and the residual beside it do; ranks add up."""
    joined = dict(adapter.tensors)
    for key in adapter.residual:
        path, _, name = key.rpartition(".")
        axis = RANK_AXES["lora"][name][0]
        joined[key] = np.concatenate([adapter.residual[key], adapter.tensors[f"{path}.{name}"]], axis=axis)
    ranks = {m.path: joined[f"{m.path}.A"].shape[0] for m in adapter.spec.modules if f"{m.path}.A" in adapter.residual}
    return AdapterState(at_ranks(adapter.spec, ranks), joined)


def as_lora(state: AdapterState) -> AdapterState:
    """The same adapter with every low-rank module as two factors, whatever it was trained as."""
    modules, tensors = [], dict(state.tensors)
    for module in state.spec.modules:
        if module.kind in RANK_AXES and module.kind != "lora":
            product = factors(module, state.tensors)
            for name, _ in module.shapes:
                del tensors[f"{module.path}.{name}"]
            pairs = {"A": product.a.astype(np.float32), "B": product.b.astype(np.float32)}
            tensors |= {f"{module.path}.{name}": value for name, value in pairs.items()}
            shapes = tuple((name, value.shape) for name, value in pairs.items())
            modules.append(replace(module, kind="lora", shapes=shapes))
        else:
            modules.append(module)
    family = "lora" if modules != list(state.spec.modules) else state.spec.family
    return replace(state, spec=replace(state.spec, family=family, modules=tuple(modules)), tensors=tensors)


def _at(module: ModuleSpec, rank: int) -> ModuleSpec:
    axes = RANK_AXES.get(module.kind)
    if axes is None or module.rank == rank:
        return module
    shapes = tuple(
        (name, tuple(rank if axis in axes[name] else size for axis, size in enumerate(shape)))
        for name, shape in module.shapes
    )
    return replace(module, rank=rank, shapes=shapes)


def fit(value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The leading corner of `value`, cut or padded with zeros to `shape`; `value` itself where it fits."""
    if value.shape == shape:
        return value
    kept = value[tuple(slice(size) for size in shape)]
    return np.pad(kept, [(0, size - have) for size, have in zip(shape, kept.shape, strict=True)])
