"""Cutting, padding and joining low-rank adapters, against products formed densely."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.adapters import (
    RANK_AXES,
    AdapterSpec,
    AdapterState,
    ModuleSpec,
    Tensors,
    absorbed,
    as_lora,
    at_rank,
    at_ranks,
    factors,
    fit,
    greatest_rank,
    low_rank_modules,
    resized,
)
from tests.toys import SPEC, WIDE, counted

sides, ranks = st.integers(1, 6), st.integers(1, 6)


def lora(path: str, outputs: int, inputs: int, rank: int) -> ModuleSpec:
    return ModuleSpec(path, "lora", rank, 2.0, (("A", (rank, inputs)), ("B", (outputs, rank))))


def square(path: str, outputs: int, inputs: int, rank: int) -> ModuleSpec:
    shapes = (("A", (rank, inputs)), ("B", (outputs, rank)), ("R", (rank, rank)))
    return ModuleSpec(path, "lora_sb", rank, 1.0, shapes)


HEAD = ModuleSpec("head", "full", 0, 1.0, (("weight", (3, 3)),))


def spec_of(*modules: ModuleSpec) -> AdapterSpec:
    return AdapterSpec("base", modules[0].kind, (*modules, HEAD))


def drawn(spec: AdapterSpec, seed: int = 0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {key: random.standard_normal(shape).astype(np.float32) for key, shape in spec.shapes.items()}


def dense(tensors: Tensors, path: str) -> np.ndarray:
    """What the module at `path` adds to its weight."""
    b, a = (tensors[f"{path}.{name}"].astype(np.float64) for name in ("B", "A"))
    middle = tensors[f"{path}.R"].astype(np.float64) if f"{path}.R" in tensors else np.eye(len(a))
    whole: np.ndarray = b @ middle @ a
    return whole


# The axes of rank have names; shapes, in which a side may equal the rank, are not asked.


def test_the_axes_of_rank_by_name() -> None:
    factors = {"A": (0,), "B": (1,)}
    assert {kind: axes for kind, axes in RANK_AXES.items() if any(axes.values())} == {
        **dict.fromkeys(("lora", "lora_fa", "hira"), factors),
        "lora_sb": {**factors, "R": (0, 1)},
        "dora": {**factors, "g": ()},
    }


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (lora("q", 4, 4, 4), {"A": (2, 4), "B": (4, 2)}),
        (lora("q", 4, 7, 4), {"A": (2, 7), "B": (4, 2)}),
        (lora("q", 7, 4, 4), {"A": (2, 4), "B": (7, 2)}),
        (square("q", 4, 4, 4), {"A": (2, 4), "B": (4, 2), "R": (2, 2)}),
        (replace(HEAD, path="q"), {"weight": (3, 3)}),
        (ModuleSpec("q", "ia3", 0, 1.0, (("l", (4, 1)),)), {"l": (4, 1)}),
    ],
)
def test_each_tensor_is_cut_along_its_axes_of_rank_and_no_other(
    module: ModuleSpec, expected: dict[str, tuple[int, ...]]
) -> None:
    assert dict(at_rank(AdapterSpec("base", "x", (module,)), 2).modules[0].shapes) == expected


@given(ranks, ranks)
def test_rank_and_shapes_go_together(before: int, after: int) -> None:
    spec = spec_of(lora("q", 4, 4, before), square("s", 5, 3, before))
    found = at_ranks(spec, {"q": after, "s": after})
    assert found == spec_of(lora("q", 4, 4, after), square("s", 5, 3, after))
    assert at_ranks(found, {"q": before, "s": before}) == spec


def test_at_rank_is_a_bound_and_no_more() -> None:
    spec = spec_of(lora("small", 5, 5, 2), lora("great", 5, 5, 6))
    assert [module.rank for module in at_rank(spec, 4).modules] == [2, 4, 0]
    assert at_rank(spec, 0) == at_rank(spec, 6) == at_rank(spec, 99) == spec
    assert [module.rank for module in at_ranks(spec, {"small": 5}).modules] == [5, 6, 0]
    assert (greatest_rank(spec), greatest_rank(AdapterSpec("base", "x", (HEAD,)))) == (6, 0)


def test_modules_with_a_tensor_missing_or_of_another_kind_are_not_low_rank() -> None:
    spec = spec_of(lora("q", 4, 4, 2), square("s", 4, 4, 2), ModuleSpec("i", "ia3", 0, 1.0, (("l", (4,)),)))
    assert [module.path for module in low_rank_modules(spec)] == ["q", "s"]
    assert low_rank_modules(spec.only(["q.A", "s.A", "s.B", "head.weight"])) == ()
    conv = ModuleSpec("c", "lora", 2, 1.0, (("A", (2, 4, 3, 3)), ("B", (4, 2, 1, 1))))
    assert low_rank_modules(AdapterSpec("base", "lora", (conv,))) == ()


# Values.


def test_the_leading_corner_is_kept() -> None:
    value = np.arange(12, dtype=np.float32).reshape(3, 4)
    assert fit(value, (3, 4)) is value
    assert fit(value, (2, 4)).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert fit(value, (3, 2)).tolist() == [[0, 1], [4, 5], [8, 9]]
    assert fit(value, (2, 5)).tolist() == [[0, 1, 2, 3, 0], [4, 5, 6, 7, 0]]
    assert fit(value, (0, 4)).shape == (0, 4)
    assert fit(value, (4, 5)).dtype == np.float32
    assert fit(np.ones((0, 4), np.float32), (2, 4)).tolist() == np.zeros((2, 4)).tolist()


@given(ranks, st.integers(0, 5), sides, sides, st.integers(0, 99))
def test_padding_changes_nothing_and_cutting_undoes_it(
    rank: int, more: int, outputs: int, inputs: int, seed: int
) -> None:
    spec = spec_of(lora("q", outputs, inputs, rank), square("s", outputs, inputs, rank))
    wide = at_ranks(spec, {"q": rank + more, "s": rank + more})
    tensors = drawn(spec, seed)
    padded = resized(tensors, wide)
    wide.require(padded, "padded")
    for path in ("q", "s"):
        np.testing.assert_allclose(dense(padded, path), dense(tensors, path), atol=1e-13)
    back = resized(padded, spec)
    assert {key: value.tobytes() for key, value in back.items()} == {k: v.tobytes() for k, v in tensors.items()}


@given(ranks, ranks, st.integers(0, 99))
def test_cutting_leaves_the_product_of_the_leading_ranks(rank: int, kept: int, seed: int) -> None:
    spec = spec_of(lora("q", 4, 5, rank))
    tensors, own = drawn(spec, seed), at_rank(spec, kept)
    cut = resized(tensors, own)
    own.require(cut, "cut")
    expected = tensors["q.B"][:, :kept].astype(float) @ tensors["q.A"][:kept]
    np.testing.assert_allclose(dense(cut, "q"), expected, atol=1e-12)
    assert cut["head.weight"] is tensors["head.weight"]


def test_resized_takes_what_the_specification_names() -> None:
    assert list(resized(counted(), WIDE.only(["left.B"]))) == ["left.B"]


@given(ranks, sides, sides, st.integers(0, 99))
def test_factors_are_what_a_module_adds_to_its_weight(rank: int, outputs: int, inputs: int, seed: int) -> None:
    spec = spec_of(lora("q", outputs, inputs, rank), square("s", outputs, inputs, rank))
    tensors, delta = drawn(spec, seed), drawn(spec, seed + 1)
    moved = {key: tensors[key].astype(np.float64) + delta[key] for key in tensors}
    for module in low_rank_modules(spec):
        still, after = factors(module, tensors), factors(module, tensors, delta)
        assert {after.b.dtype, after.a.dtype} == {np.dtype(np.float64)}
        assert (after.rank, after.shape) == (rank, (outputs, inputs))
        np.testing.assert_allclose(still.b @ still.a, dense(tensors, module.path), atol=1e-5)
        np.testing.assert_allclose(after.b @ after.a, dense(moved, module.path), atol=1e-5)


def test_a_tensor_that_a_delta_lacks_did_not_move() -> None:
    module = WIDE.modules[1]
    found = factors(module, counted(), {"left.B": np.ones((6, 4), np.float32)})
    assert found.a.tolist() == counted()["left.A"].tolist()
    assert found.b.tolist() == (counted()["left.B"] + 1).tolist()


def test_sums_that_float32_rounds_away_are_kept() -> None:
    found = factors(
        SPEC.modules[1],
        {"layer.A": np.full((1, 1), 1e8, np.float32), "layer.B": np.ones((1, 1), np.float32)},
        {"layer.A": np.ones((1, 1), np.float32)},
    )
    assert found.a.tolist() == [[1e8 + 1]]


# Adapter and residual as one.


@given(ranks, st.integers(0, 7), sides, sides, st.integers(0, 99))
def test_absorbed_does_what_adapter_and_residual_do(rank: int, more: int, outputs: int, inputs: int, seed: int) -> None:
    spec = spec_of(lora("q", outputs, inputs, rank), lora("v", inputs, outputs, rank))
    residual = {
        key: value
        for key, value in drawn(at_ranks(spec, {"q": more, "v": rank}), seed + 1).items()
        if not key.startswith("head")
    }
    one = AdapterState(spec, drawn(spec, seed), residual)
    whole = absorbed(one)
    assert whole.residual == {}
    assert [module.rank for module in whole.spec.modules] == [rank + more, 2 * rank, 0]
    whole.spec.require(whole.tensors, "absorbed")
    for path in ("q", "v"):
        expected = dense(one.tensors, path) + dense(residual, path)
        np.testing.assert_allclose(dense(whole.tensors, path), expected, atol=1e-5)
    assert whole.tensors["head.weight"] is one.tensors["head.weight"]


def test_a_module_with_as_many_outputs_as_ranks_is_joined_along_its_ranks() -> None:
    spec = spec_of(lora("q", 4, 4, 4))
    residual = {key: value for key, value in drawn(spec, 1).items() if not key.startswith("head")}
    one = AdapterState(spec, drawn(spec), residual)
    whole = absorbed(one)
    assert (whole.tensors["q.A"].shape, whole.tensors["q.B"].shape) == ((8, 4), (4, 8))
    np.testing.assert_allclose(dense(whole.tensors, "q"), dense(one.tensors, "q") + dense(residual, "q"), atol=1e-5)


def test_modules_that_the_residual_does_not_touch_stay_as_they_are() -> None:
    residual = {"left.A": np.ones((2, 7), np.float32), "left.B": np.ones((6, 2), np.float32)}
    whole = absorbed(AdapterState(WIDE, counted(), residual))
    assert [module.rank for module in whole.spec.modules] == [0, 6, 4]
    assert whole.tensors["right.A"].tolist() == counted()["right.A"].tolist()
    alone = absorbed(AdapterState(WIDE, counted()))
    assert alone.spec == WIDE
    assert {key: value.tobytes() for key, value in alone.tensors.items()} == {
        key: value.tobytes() for key, value in counted().items()
    }


# As two factors.


@given(ranks, sides, sides, st.integers(0, 99))
def test_as_lora_does_what_the_adapter_does(rank: int, outputs: int, inputs: int, seed: int) -> None:
    spec = spec_of(square("s", outputs, inputs, rank), lora("q", outputs, inputs, rank))
    one = AdapterState(spec, drawn(spec, seed))
    two = as_lora(one)
    two.spec.require(two.tensors, "as LoRA")
    assert (two.spec.family, {module.kind for module in two.spec.modules}) == ("lora", {"lora", "full"})
    assert [module.rank for module in two.spec.modules] == [rank, rank, 0]
    for path in ("s", "q"):
        np.testing.assert_allclose(dense(two.tensors, path), dense(one.tensors, path), atol=1e-5)
    for key in ("q.A", "q.B", "head.weight"):
        assert two.tensors[key] is one.tensors[key]


def test_what_is_a_lora_already_stays_one() -> None:
    one = AdapterState(WIDE, counted())
    assert as_lora(one).spec == WIDE
    ia3 = AdapterState(AdapterSpec("base", "ia3", (HEAD,)), {"head.weight": np.ones((3, 3), np.float32)})
    assert as_lora(ia3).spec.family == "ia3"


def test_as_lora_keeps_what_stands_beside_the_base() -> None:
    residual = {"left.A": np.ones((2, 7), np.float32), "left.B": np.ones((6, 2), np.float32)}
    assert absorbed(as_lora(AdapterState(WIDE, counted(), residual))).spec.modules[1].rank == 6
