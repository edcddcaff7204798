"""What an adapter is: which tensors of which modules, and their values."""

from __future__ import annotations

import fnmatch
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from fedpeft.errors import AdapterError, sentence

Tensors = Mapping[str, np.ndarray]
"""Float32 arrays by key `module.path.tensor`."""


@dataclass(frozen=True)
class ModuleSpec:
    """The adapter's tensors on one module of the base.

    `kind` says which algebra holds (`lora`, `ia3`, `prompt`, `full`); `rank` is 0 where the kind has none;
    `scale` is what the product of the factors is multiplied by inside the model (already folded into the
    tensors of an `AdapterState`); `shapes` are (tensor, shape) pairs in order of name.
    """

    path: str
    kind: str
    rank: int
    scale: float
    shapes: tuple[tuple[str, tuple[int, ...]], ...]


@dataclass(frozen=True)
class AdapterSpec:
    """The schema of an adapter: which base it belongs to and every tensor it holds."""

    base_model: str
    family: str
    modules: tuple[ModuleSpec, ...]

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each tensor by key, in the order in which tensors travel."""
        pairs = ((f"{m.path}.{name}", shape) for m in self.modules for name, shape in m.shapes)
        return dict(sorted(pairs))

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the whole specification."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    @property
    def parameters(self) -> int:
        """How many numbers an adapter of this specification holds."""
        return sum(int(np.prod(shape)) for shape in self.shapes.values())

    def without(self, patterns: Iterable[str]) -> AdapterSpec:
        """The specification less the tensors whose key matches one of `patterns` (as in `fnmatch`)."""
        dropped = set(self.matching(patterns))
        return self.only(key for key in self.shapes if key not in dropped)

    def only(self, keys: Iterable[str]) -> AdapterSpec:
        """The specification of the tensors named by `keys`, in its own order."""
        kept, modules = set(keys), []
        for module in self.modules:
            shapes = tuple(item for item in module.shapes if f"{module.path}.{item[0]}" in kept)
            if shapes:
                modules.append(replace(module, shapes=shapes))
        return replace(self, modules=tuple(modules))

    def matching(self, patterns: Iterable[str]) -> tuple[str, ...]:
        """The keys that match one of `patterns`.

        Raises:
            AdapterError: a pattern matches nothing.
        """
        matched: set[str] = set()
        for pattern in patterns:
            keys = fnmatch.filter(self.shapes, pattern)
            if not keys:
                some = ", ".join(list(self.shapes)[:3])
                raise AdapterError(
                    sentence(
                        f"pattern {pattern!r}",
                        expected=f"a match among the adapter's {len(self.shapes)} tensors (such as {some})",
                        found="none",
                        remedy="correct the pattern",
                    )
                )
            matched.update(keys)
        return tuple(key for key in self.shapes if key in matched)

    def require(self, tensors: Tensors, place: str) -> None:
        """Raises AdapterError unless `tensors` are exactly this specification's, float32 and finite."""
        if tensors.keys() != self.shapes.keys():
            odd = sorted(tensors.keys() ^ self.shapes.keys())
            raise AdapterError(
                sentence(
                    place,
                    expected=f"the {len(self.shapes)} tensors of the specification",
                    found=f"{len(odd)} missing or unknown, such as {odd[0]!r}",
                    remedy="use the adapter settings that the federation was started with",
                )
            )
        for key, shape in self.shapes.items():
            value = tensors[key]
            if value.shape != shape or value.dtype != np.float32:
                raise AdapterError(
                    sentence(
                        f"{place}, tensor {key}",
                        expected=f"float32 of shape {shape}",
                        found=f"{value.dtype} of shape {value.shape}",
                        remedy="use the adapter settings that the federation was started with",
                    )
                )
            if not np.isfinite(value).all():
                raise AdapterError(
                    sentence(
                        f"{place}, tensor {key}",
                        expected="finite numbers",
                        found="NaN or infinity",
                        remedy="lower the learning rate or clip the update",
                    )
                )


@dataclass(frozen=True)
class AdapterState:
    """The values of an adapter.

    Float32. For LoRA, A is `(rank, in)` and B is `(out, rank)` with the scale folded in, so that adapters of
    unlike alpha and rank are comparable: the change of the weight is B @ A. `residual` is a low-rank change of
    the base that the adapter stands on and that is not trained: `path.A` and `path.B` of each module it touches.
    """

    spec: AdapterSpec
    tensors: Tensors
    residual: Tensors = field(default_factory=dict)


def norm(tensors: Tensors) -> float:
    """The Euclidean norm over all tensors, accumulated in float64."""
    return float(np.sqrt(sum(float(np.vdot(v := value.astype(np.float64), v)) for value in tensors.values())))


def spec_to_fields(spec: AdapterSpec) -> dict[str, Any]:
    """A specification as plain JSON values."""
    return asdict(spec)


def spec_from_fields(fields: Mapping[str, Any]) -> AdapterSpec:
    """The inverse of `spec_to_fields`."""
    modules = tuple(
        ModuleSpec(
            path=module["path"],
            kind=module["kind"],
            rank=int(module["rank"]),
            scale=float(module["scale"]),
            shapes=tuple((name, tuple(int(n) for n in shape)) for name, shape in module["shapes"]),
        )
        for module in fields["modules"]
    )
    return AdapterSpec(fields["base_model"], fields["family"], modules)
