"""Low-rank modules: which axes are the rank, how an adapter is cut or padded to another, and what it does.

A node of rank r holds the leading r rows of A and columns of B. Cutting is lossy unless what is cut is zero;
padding with zeros is not, because a product does not see rows of A that meet columns of zeros in B.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from fedpeft.adapters.algebra import Factors, Named
from fedpeft.adapters.kinds import INEXACT, KINDS
from fedpeft.adapters.spec import AdapterSpec, AdapterState, ModuleSpec, Tensors
from fedpeft.errors import AdapterError

RANK_AXES: Mapping[str, Mapping[str, tuple[int, ...]]] = {
    name: kind.axes for name, kind in KINDS.items() if kind.product is not None
}
"""The axes of each tensor that count the rank, by kind of module. They are named, never guessed from sizes."""


def low_rank_modules(spec: AdapterSpec) -> tuple[ModuleSpec, ...]:
    """The modules whose effect is linear in a product of two matrices, all tensors of it in `spec`."""
    return tuple(
        module
        for module in spec.modules
        if module.kind in RANK_AXES
        and KINDS[module.kind].whole([name for name, _ in module.shapes])
        and all(len(shape) <= 2 for _, shape in module.shapes)
    )


def fixed(spec: AdapterSpec) -> tuple[str, ...]:
    """The keys of the tensors that nobody ever trains."""
    return tuple(f"{m.path}.{name}" for m in spec.modules for name, _ in m.shapes if name in KINDS[m.kind].fixed)


def factors(module: ModuleSpec, tensors: Tensors, delta: Tensors | None = None) -> Factors:
    """What a module adds to its weight, in float64, after `delta`, which may lack a tensor that does not move."""
    moved = delta or {}

    def tensor(name: str) -> np.ndarray:
        key = f"{module.path}.{name}"
        return np.add(tensors[key], moved.get(key, 0.0), dtype=np.float64)

    product = KINDS[module.kind].product
    if product is None:
        raise AdapterError(f"{module.path}: expected a product, found kind {module.kind}, which has none; a bug.")
    return product(tensor, [name for name, _ in module.shapes])


def solved(module: ModuleSpec, tensors: Tensors, after: Factors) -> Named:
    """The tensors with which a module does what `after` does, or what comes nearest, in float64, by name.

    `tensors` are those that it has now: where they do not matter, they stay.

    Raises:
        AdapterError: no tensors of this kind can be found from what they shall do.
    """
    solve = KINDS[module.kind].solve
    if solve is None:
        raise AdapterError(f"{module.path}: expected a kind that takes new factors, found {module.kind}; a bug.")
    return solve(after, lambda name: np.asarray(tensors[f"{module.path}.{name}"], np.float64), dict(module.shapes))


def at_rank(spec: AdapterSpec, rank: int) -> AdapterSpec:
    """`spec` as a node of rank `rank` holds it: no module's rank is above it (0 leaves all as they are)."""
    return at_ranks(spec, {path: min(own, rank) for path, own in ranks_of(spec).items()}) if rank else spec


def at_ranks(spec: AdapterSpec, ranks: Mapping[str, int]) -> AdapterSpec:
    """`spec` with the low-rank modules that `ranks` names, by path, at other ranks."""
    return replace(spec, modules=tuple(_at(module, ranks.get(module.path, module.rank)) for module in spec.modules))


def ranks_of(spec: AdapterSpec) -> dict[str, int]:
    """The rank of each module, by path, of which it can be changed."""
    return {module.path: module.rank for module in spec.modules if resizable(module)}


def greatest_rank(spec: AdapterSpec) -> int:
    """The greatest rank of a module of which the rank can be changed; 0 where there is none."""
    return max(ranks_of(spec).values(), default=0)


def inexact(spec: AdapterSpec) -> dict[str, str]:
    """The kinds of modules in `spec` of which the mean of numbers is not the mean of what they do, and why."""
    kinds = sorted({module.kind for module in spec.modules})
    return {kind: KINDS[kind].why for kind in kinds if KINDS[kind].mean == INEXACT}


def rank_of(module: ModuleSpec) -> int:
    """The rank of what a module does, from its shapes; 0 where that is no product."""
    kind, shapes = KINDS[module.kind], dict(module.shapes)
    if kind.product is None or not kind.whole(shapes):
        return 0
    if "A" in shapes and any(
        len(shape) > 2 for shape in shapes.values()
    ):  # a convolution, whose factors are tensors of more axes
        return shapes["A"][0]
    return kind.product(lambda name: np.zeros(shapes[name]), list(shapes)).rank


def resizable(module: ModuleSpec) -> bool:
    """Whether a node may hold the module at another rank."""
    return any(RANK_AXES.get(module.kind, {}).values())


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
    """The same adapter with every module whose change of the weight is a product as two factors of it."""
    modules, tensors = [], dict(state.tensors)
    for module in state.spec.modules:
        if KINDS[module.kind].weight and module.kind != "lora":
            product = factors(module, state.tensors)
            for name, _ in module.shapes:
                del tensors[f"{module.path}.{name}"]
            pairs = {"A": product.a.astype(np.float32), "B": product.b.astype(np.float32)}
            tensors |= {f"{module.path}.{name}": value for name, value in pairs.items()}
            shapes = tuple((name, value.shape) for name, value in pairs.items())
            modules.append(replace(module, kind="lora", rank=product.rank, shapes=shapes))
        else:
            modules.append(module)
    family = "lora" if modules != list(state.spec.modules) else state.spec.family
    return replace(state, spec=replace(state.spec, family=family, modules=tuple(modules)), tensors=tensors)


def _at(module: ModuleSpec, rank: int) -> ModuleSpec:
    if module.rank == rank or not resizable(module):
        return module
    axes = RANK_AXES[module.kind]
    shapes = tuple(
        (name, tuple(rank if axis in axes.get(name, ()) else size for axis, size in enumerate(shape)))
        for name, shape in module.shapes
    )
    return replace(module, rank=rank, shapes=shapes)


def fit(value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The leading corner of `value`, cut or padded with zeros to `shape`; `value` itself where it fits."""
    if value.shape == shape:
        return value
    kept = value[tuple(slice(size) for size in shape)]
    return np.pad(kept, [(0, size - have) for size, have in zip(shape, kept.shape, strict=True)])
