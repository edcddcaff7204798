"""Coordinates in which the length of an update is that of what it does to the weights.

Where one factor of a product is trained and the other stands still, what the adapter does is linear in the trained
one: ‖ΔB A‖ = ‖ΔB (A Aᵀ)^½‖ (Frobenius norms). Clipping and noise happen in the right-hand coordinates, so a client
cannot reach further by way of a frozen factor that is large, and noise falls evenly on the product. Where both factors
are trained, no linear coordinates exist, and the numbers are taken as they are.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np

from fedpeft.adapters import AdapterSpec, Tensors

LEAST_SHARE = 1e-3
"""The least singular value of a frozen factor, as a share of its greatest, below which its directions count as that.

So that no direction is without length, where noise would have no bound.
"""

_LINEAR: Mapping[tuple[frozenset[str], str], tuple[str, str]] = {
    (frozenset({"A", "B"}), "B"): ("", "A"),
    (frozenset({"A", "B"}), "A"): ("B", ""),
    (frozenset({"A", "B", "R"}), "R"): ("B", "A"),
}
"""By a module's tensors and the only one of them that is trained: what stands to the left and the right of it."""


@dataclass(frozen=True)
class Sides:
    """What a tensor is multiplied with from the left and the right to be in these coordinates, and to be back.

    Each is `(rank, rank)`, float64, or None.
    """

    left: np.ndarray | None = None
    right: np.ndarray | None = None

    def there(self, value: np.ndarray) -> np.ndarray:
        """`value` in these coordinates, float64."""
        return _between(self.left, value.astype(np.float64), self.right)

    def back(self, value: np.ndarray) -> np.ndarray:
        """What `there` makes `value` of."""
        inverse = [None if side is None else np.linalg.inv(side) for side in (self.left, self.right)]
        return _between(inverse[0], value, inverse[1])


AS_IT_IS = Sides()


def geometry(spec: AdapterSpec, tensors: Tensors, trained: Collection[str]) -> dict[str, Sides]:
    """The coordinates of each tensor that is `trained`, of an adapter that holds `tensors`."""
    found = dict.fromkeys(trained, AS_IT_IS)
    for module in spec.modules:
        names = frozenset(name for name, _ in module.shapes)
        moving = [name for name in names if f"{module.path}.{name}" in found]
        sides = _LINEAR.get((names, moving[0])) if len(moving) == 1 else None
        if sides:
            left, right = (tensors[f"{module.path}.{name}"].astype(np.float64) if name else None for name in sides)
            found[f"{module.path}.{moving[0]}"] = Sides(
                None if left is None else _root(left.swapaxes(-1, -2) @ left),
                None if right is None else _root(right @ right.swapaxes(-1, -2)),
            )
    return found


def _root(gram: np.ndarray) -> np.ndarray:
    """The symmetric square root of a Gram matrix `(..., rank, rank)`, no eigenvalue below its least share."""
    values, vectors = np.linalg.eigh(gram)
    sizes = np.sqrt(np.clip(values, 0.0, None))
    greatest = sizes.max(axis=-1, keepdims=True)
    sizes = np.where(greatest > 0, np.maximum(sizes, LEAST_SHARE * greatest), 1.0)
    root: np.ndarray = (vectors * sizes[..., None, :]) @ vectors.swapaxes(-1, -2)
    return root


def _between(left: np.ndarray | None, value: np.ndarray, right: np.ndarray | None) -> np.ndarray:
    value = value if left is None else left @ value
    return value if right is None else value @ right
