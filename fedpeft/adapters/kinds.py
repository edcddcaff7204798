"""Kinds of adapter modules: what the numbers of one do, and whether their mean is the mean of what adapters do.

A kind is *exact* where the effect is linear in its numbers, given that all nodes hold the same frozen ones: the mean
of the numbers is then the mean of the effects. A *product* has an effect that is linear in the product of two
matrices, so the exact mean is a sum of products, and a rule decides what becomes of it. What is neither is *inexact*:
its numbers are averaged, and the journal says so.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

from fedpeft.adapters import algebra
from fedpeft.adapters.algebra import Factors, Tensor

EXACT, PRODUCT, INEXACT = "exact", "product", "inexact"


@dataclass(frozen=True)
class Kind:
    """What a server knows of a kind of module.

    `mean` is one of `EXACT`, `PRODUCT` and `INEXACT`, and `why` says in half a sentence what makes it so. Of a product,
    `axes` names its tensors and the axes of each that count the rank (none: it cannot be changed), `forms` the sets of
    tensors of which a module may consist (none: all of `axes`), `product` is what it does in factors, and
    `solve(after, tensor, shapes)` the tensors that do what `after` does, or what comes nearest, by name; without
    it no rule can make new factors. `fixed` tensors are never trained, `beside` ones are no part of the product.
    `coupled` ones move whenever the module is trained, so none of them can be frozen alone. `residual` says that the
    base can take up what the adapter does not hold, `weight` that the product is the change of the weight itself,
    `moved` that what travels are other numbers than those that are trained.
    """

    mean: str
    why: str
    axes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    forms: tuple[frozenset[str], ...] = ()
    fixed: tuple[str, ...] = ()
    coupled: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()
    product: Callable[[Tensor, Collection[str]], Factors] | None = None
    solve: Callable[[Factors, Tensor, Mapping[str, tuple[int, ...]]], algebra.Named] | None = None
    weight: bool = False
    residual: bool = False
    moved: bool = False

    def whole(self, names: Collection[str]) -> bool:
        """Whether tensors of these names are a module of this kind, none lacking."""
        return set(names) in (self.forms or (frozenset(self.axes),))


_FACTORS: Mapping[str, tuple[int, ...]] = {"A": (0,), "B": (1,)}

KINDS: Mapping[str, Kind] = {
    "lora": Kind(
        PRODUCT,
        "the change of the weight is B A",
        _FACTORS,
        product=algebra.two_factors,
        solve=algebra.as_two_factors,
        weight=True,
        residual=True,
    ),
    "lora_fa": Kind(
        EXACT, "A is fixed, so B A is linear in B", _FACTORS, fixed=("A",), product=algebra.two_factors, weight=True
    ),
    "lora_sb": Kind(
        EXACT,
        "A and B are fixed, so B R A is linear in R",
        {**_FACTORS, "R": (0, 1)},
        fixed=("A", "B"),
        product=algebra.three_factors,
        weight=True,
    ),
    "dora": Kind(
        PRODUCT,
        "rows of the weight are scaled by g, of which the mean is exact, beside the product B A",
        {**_FACTORS, "g": ()},
        coupled=("B", "g"),
        beside=("g",),
        moved=True,
        product=algebra.two_factors,
        solve=algebra.as_two_factors,
    ),
    "hira": Kind(
        PRODUCT,
        "the change of the weight is itself times B A, number by number",
        _FACTORS,
        product=algebra.two_factors,
        solve=algebra.as_two_factors,
    ),
    "adalora": Kind(
        PRODUCT,
        "the change of the weight is B diag(E) A",
        {"A": (), "B": (), "E": ()},
        product=algebra.singular_triplets,
        solve=algebra.as_singular_triplets,
        weight=True,
    ),
    "loha": Kind(
        PRODUCT,
        "the change of the weight is two low-rank products multiplied number by number, a product of rank r²",
        {"w1_a": (), "w1_b": (), "w2_a": (), "w2_b": ()},
        product=algebra.hadamard,
        weight=True,
    ),
    "lokr": Kind(
        PRODUCT,
        "the change of the weight is a Kronecker product, a product of rank 1 of its factors' numbers",
        {"w1": (), "w2": (), "w2_a": (), "w2_b": ()},
        forms=(frozenset({"w1", "w2"}), frozenset({"w1", "w2_a", "w2_b"})),
        product=algebra.kronecker,
        solve=algebra.as_kronecker,
    ),
    "vera": Kind(
        PRODUCT,
        "between fixed matrices stands b dᵀ, a product of rank 1",
        {"b": (), "d": ()},
        product=algebra.outer,
        solve=algebra.as_outer,
    ),
    "vera_b": Kind(EXACT, "d is fixed, so the change of the weight is linear in b", {"b": (), "d": ()}, fixed=("d",)),
    "full": Kind(EXACT, "the numbers are weights of the model"),
    "selective": Kind(EXACT, "the numbers are weights of the model"),
    "mask": Kind(
        EXACT, "the numbers are weights of the model, at places that the server chose for all nodes", fixed=("places",)
    ),
    "ia3": Kind(EXACT, "activations are multiplied by the numbers"),
    "layer_norm": Kind(EXACT, "the numbers are weights of the model"),
    "ssf": Kind(EXACT, "features are scaled and shifted by the numbers"),
    "tokens": Kind(EXACT, "the numbers are rows of the embedding"),
    "prompt": Kind(EXACT, "the numbers are vectors that the model reads, slot by slot"),
    "encoded": Kind(EXACT, "the vectors that an encoder makes travel, slot by slot, and not the encoder", moved=True),
    "miss": Kind(EXACT, "the change of the weight is linear in the block that it repeats"),
    "c3a": Kind(EXACT, "the change of the weight is linear in the kernels of its circulant blocks"),
    "fourierft": Kind(EXACT, "the change of the weight is linear in its spectrum, at places that all nodes share"),
    "waveft": Kind(EXACT, "the change of the weight is linear in its wavelets, at places that all nodes share"),
    "shira": Kind(EXACT, "the numbers are entries of the weight, at places that all nodes share"),
    "frod": Kind(EXACT, "the change of the weight is linear in the numbers between bases that all nodes share"),
    "tinylora": Kind(EXACT, "the change of the weight is linear in the numbers between bases that all nodes share"),
    "road": Kind(
        EXACT,
        "pairs of outputs are rotated and scaled, and cosine and sine parts travel",
        coupled=("cosine", "sine"),
        moved=True,
    ),
    "oft": Kind(INEXACT, "a rotation is not linear in the skew matrix that makes it"),
    "boft": Kind(INEXACT, "a product of rotations is not linear in the skew matrices that make them"),
    "hra": Kind(INEXACT, "a chain of reflections is not linear in their directions"),
    "randlora": Kind(INEXACT, "the change of the weight multiplies two trained vectors"),
    "bottleneck": Kind(INEXACT, "a layer with a nonlinearity is not linear in its weights"),
    "llama_adapter": Kind(INEXACT, "a gate multiplies attention over trained vectors"),
}
"""Every kind of module, by name."""
