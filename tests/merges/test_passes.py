"""What travels in the two passes of a sketch: the same shapes at every rank, nothing too long, and the mean back."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fedpeft.adapters import AdapterSpec, AdapterState, ModuleSpec, at_rank, factors
from fedpeft.errors import AdapterError
from fedpeft.merges import Passes, passes, products
from fedpeft.updates import Update

OUT, IN = 12, 9
HEAD = ModuleSpec("head", "full", 0, 1.0, (("weight", (3, OUT)),))
MODULES = tuple(ModuleSpec(path, "lora", 3, 1.0, (("A", (3, IN)), ("B", (OUT, 3)))) for path in ("k", "v"))
SPEC = AdapterSpec("base", "lora", (HEAD, *MODULES))


def plan(width: int = 0) -> Passes:
    return Passes(SPEC, width, seed=5, round=2)


def client(seed: int, rank: int, by: float = 1.0) -> tuple[Update, AdapterState]:
    random, spec = np.random.default_rng(seed), at_rank(SPEC, rank)
    before, delta = (
        {key: (size * random.standard_normal(shape)).astype(np.float32) for key, shape in spec.shapes.items()}
        for size in (1.0, by)
    )
    return Update(spec, delta, 1, 1), AdapterState(spec, before)


def length(lent: passes.Lent) -> float:
    return math.hypot(np.linalg.norm(lent.tensors["head.weight"]), *map(products.frobenius, lent.products.values()))


def test_what_is_sent_and_told_has_the_same_shapes_at_every_rank() -> None:
    for rank in (1, 3):
        update, received = client(0, rank)
        lent = passes.lend(plan(4), update, received, 1e9)
        assert {key: value.shape for key, value in lent.tensors.items()} == plan(4).first.shapes
        bases = passes.bases_of(plan(4), lent.tensors)
        passes.require_bases(plan(4), bases, "bases")
        projected = passes.project(plan(4), lent.products, bases)
        assert {key: value.shape for key, value in projected.items()} == plan(4).second.shapes
    assert plan(4).first.shapes == {"head.weight": (3, OUT), "k.Y": (OUT, 4), "v.Y": (OUT, 4)}
    assert plan(4).second.shapes == {"k.Z": (4, IN), "v.Z": (4, IN)}
    assert plan().columns(MODULES[0]) == IN


def test_products_and_all_else_are_shortened_together() -> None:
    update, received = client(1, 3)
    free = passes.lend(plan(), update, received, 1e9)
    assert free.size == pytest.approx(length(free))
    assert free.products["k"].b @ free.products["k"].a == pytest.approx(
        (lambda f: f.b @ f.a)(factors(MODULES[0], received.tensors, update.delta))
    )
    short = passes.lend(plan(), update, received, 2.0)
    assert length(short) == pytest.approx(2.0)
    assert short.size == free.size
    np.testing.assert_allclose(short.tensors["head.weight"], 2.0 / free.size * update.delta["head.weight"], rtol=1e-6)
    np.testing.assert_allclose(short.tensors["k.Y"], 2.0 / free.size * free.tensors["k.Y"], rtol=1e-6)


def test_two_sums_of_unlike_ranks_come_to_the_exact_mean_of_products() -> None:
    lent = [passes.lend(plan(8), *client(seed, rank), 1e9) for seed, rank in enumerate((1, 1, 2))]
    mean = {key: np.mean([one.tensors[key] for one in lent], axis=0) for key in plan(8).first.shapes}
    bases = passes.bases_of(plan(8), mean)
    seconds = [passes.project(plan(8), one.products, bases) for one in lent]
    found, lacks = passes.joined(
        plan(8), mean, bases, {key: np.mean([one[key] for one in seconds], axis=0) for key in plan(8).second.shapes}
    )
    for module in found.spec.modules[1:]:
        wanted = np.mean([one.products[module.path].b @ one.products[module.path].a for one in lent], axis=0)
        b, a = (found.tensors[f"{module.path}.{name}"] for name in "BA")
        np.testing.assert_allclose(b @ a, wanted, atol=1e-5)
    np.testing.assert_allclose(found.tensors["head.weight"], mean["head.weight"], rtol=1e-6)
    assert lacks.keys() == {"k", "v"}
    assert max(lacks.values()) < 1e-10


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda q: 1.01 * q, "orthonormal columns, found columns that are 0.02 from that"),
        (lambda q: np.concatenate([q[:, :1], q[:, :-1]], axis=1), "orthonormal columns"),
        (lambda q: np.full_like(q, np.nan), "finite numbers"),
        (lambda q: q[:, :2], "of shape"),
    ],
)
def test_bases_that_are_none_are_refused(spoil, words) -> None:
    bases = passes.bases_of(plan(4), passes.lend(plan(4), *client(2, 3), 1e9).tensors)
    with pytest.raises(AdapterError, match=words):
        passes.require_bases(plan(4), {**bases, "v.Q": spoil(bases["v.Q"])}, "bases of partition 1")
