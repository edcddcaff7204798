"""Products in factored form: what modules of each kind do, and back from what shall be done to their tensors."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

import numpy as np

Tensor = Callable[[str], np.ndarray]
"""A module's tensor by its name, in float64."""

Named = Mapping[str, np.ndarray]
"""A module's tensors by name."""

_TINY = 1e-30
"""Below this a norm counts as zero."""


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


def two_factors(tensor: Tensor, names: Collection[str]) -> Factors:  # noqa: ARG001
    """B A."""
    return Factors(tensor("B"), tensor("A"))


def as_two_factors(after: Factors, tensor: Tensor, shapes: Mapping[str, tuple[int, ...]]) -> Named:
    """B and A at their shapes; a pair of a column and a row that is not needed keeps one of them, so that it can learn.

    With both at zero neither would ever have a gradient. The row of A is kept, or, where A begins at zero, as on an
    embedding, the column of B.
    """
    lacking = shapes["A"][0] - after.rank
    b, a = np.pad(after.b, [(0, 0), (0, lacking)]), np.pad(after.a, [(0, lacking), (0, 0)])
    idle = ~(b.any(axis=0) | a.any(axis=1))
    rows = idle & tensor("A").any(axis=1)
    columns = idle & ~rows
    a[rows], b[:, columns] = tensor("A")[rows], tensor("B")[:, columns]
    return {"B": b, "A": a}


def three_factors(tensor: Tensor, names: Collection[str]) -> Factors:  # noqa: ARG001
    """B R A."""
    return Factors(tensor("B") @ tensor("R"), tensor("A"))


def singular_triplets(tensor: Tensor, names: Collection[str]) -> Factors:  # noqa: ARG001
    """B diag(E) A.

    Source: AdaLoRA, Zhang et al. 2023, "Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning", eq. 3.
    """
    return Factors(tensor("B"), tensor("E") * tensor("A"))


def as_singular_triplets(after: Factors, tensor: Tensor, shapes: Mapping[str, tuple[int, ...]]) -> Named:  # noqa: ARG001
    """A and B with rows and columns of norm 1, and E; a triplet that is not needed keeps its directions, with E = 0."""
    b, a, e = tensor("B").copy(), tensor("A").copy(), np.zeros_like(tensor("E"))
    sizes_b, sizes_a = np.linalg.norm(after.b, axis=0), np.linalg.norm(after.a, axis=1)
    for at, (size_b, size_a) in enumerate(zip(sizes_b, sizes_a, strict=True)):
        if size_b * size_a > _TINY:
            b[:, at], a[at], e[at] = after.b[:, at] / size_b, after.a[at] / size_a, size_b * size_a
    return {"A": a, "B": b, "E": e}


def hadamard(tensor: Tensor, names: Collection[str]) -> Factors:  # noqa: ARG001
    """(W1a W1b) ⊙ (W2a W2b) as one product of rank r²: row by row, all pairs of columns, and of rows.

    Source: LoHa, Hyeon-Woo et al. 2022, "FedPara: Low-Rank Hadamard Product for Communication-Efficient Federated
    Learning", proposition 1.
    """
    outputs, inputs = tensor("w1_a").shape[0], tensor("w1_b").shape[1]
    b = np.einsum("oi,oj->oij", tensor("w1_a"), tensor("w2_a")).reshape(outputs, -1)
    a = np.einsum("ix,jx->ijx", tensor("w1_b"), tensor("w2_b")).reshape(-1, inputs)
    return Factors(b, a)


def kronecker(tensor: Tensor, names: Collection[str]) -> Factors:
    """W1 ⊗ W2, rearranged so that it is vec(W1) vec(W2)ᵀ; norms are those of the Kronecker product.

    Source: Van Loan and Pitsianis 1993, "Approximation with Kronecker Products", theorem 2.1; LoKr, Yeh et al. 2024,
    "Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation", section 3.2.
    """
    right = tensor("w2") if "w2" in names else tensor("w2_a") @ tensor("w2_b")
    return Factors(tensor("w1").reshape(-1, 1), right.reshape(1, -1))


def as_kronecker(after: Factors, tensor: Tensor, shapes: Mapping[str, tuple[int, ...]]) -> Named:
    """W1 and W2 from the leading pair; where W2 is a product itself, its best of that rank."""
    left, right = after.b[:, :1].reshape(shapes["w1"]), after.a[:1]
    if not np.linalg.norm(left) * np.linalg.norm(right) > _TINY:
        return {name: np.zeros(shape) if name == "w1" else tensor(name) for name, shape in shapes.items()}
    if "w2" in shapes:
        return {"w1": left, "w2": right.reshape(shapes["w2"])}
    (rows, rank), (_, columns) = shapes["w2_a"], shapes["w2_b"]
    u, values, v = np.linalg.svd(right.reshape(rows, columns), full_matrices=False)
    root = np.sqrt(values[:rank])
    pad = rank - len(root)
    w2_a, w2_b = np.pad(u[:, :rank] * root, [(0, 0), (0, pad)]), np.pad(root[:, None] * v[:rank], [(0, pad), (0, 0)])
    return {"w1": left, "w2_a": w2_a, "w2_b": w2_b}


def outer(tensor: Tensor, names: Collection[str]) -> Factors:  # noqa: ARG001
    """B dᵀ, which stands between the fixed matrices number by number.

    Source: VeRA, Kopiczko et al. 2024, "VeRA: Vector-based Random Matrix Adaptation", eq. 2.
    """
    return Factors(tensor("b")[:, None], tensor("d")[None, :])


def as_outer(after: Factors, tensor: Tensor, shapes: Mapping[str, tuple[int, ...]]) -> Named:  # noqa: ARG001
    """B and d from the leading pair, d of the norm and the side that it had."""
    d, b, a = tensor("d"), after.b[:, 0], after.a[0]
    size, had = np.linalg.norm(a), np.linalg.norm(d)
    if not size * np.linalg.norm(b) > _TINY or not had > _TINY:
        return {"b": np.zeros_like(b), "d": d}
    by = (had / size) * (-1.0 if a @ d < 0 else 1.0)
    return {"b": b / by, "d": a * by}
