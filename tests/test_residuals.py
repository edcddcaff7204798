"""The residual beside the base, against the same kept as dense matrices."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpeft import residuals
from fedpeft.adapters import AdapterSpec, AdapterState, Factors, ModuleSpec, Tensors
from fedpeft.residuals import Grown
from fedpeft.updates import Drift
from tests.toys import bits, counted

SIDES = {"left": (6, 7), "right": (9, 4)}
LAYERS = AdapterSpec(
    "base",
    "lora",
    (
        ModuleSpec("head", "full", 0, 1.0, (("weight", (1,)),)),
        *(ModuleSpec(path, "lora", 3, 2.0, (("A", (3, i)), ("B", (o, 3)))) for path, (o, i) in SIDES.items()),
    ),
)


def values() -> dict[str, np.ndarray]:
    return counted(3, LAYERS)


def drawn(rank: int, seed: int, **scale: float) -> dict[str, Factors]:
    random = np.random.default_rng(seed)
    return {
        path: Factors(
            scale.get(path, 1.0) * random.standard_normal((outputs, rank)), random.standard_normal((rank, inputs))
        )
        for path, (outputs, inputs) in SIDES.items()
    }


def dense(residual: Tensors) -> dict[str, np.ndarray]:
    return {path: residual[f"{path}.B"].astype(np.float64) @ residual[f"{path}.A"].astype(np.float64) for path in SIDES}


def added(*parts: dict[str, Factors]) -> dict[str, np.ndarray]:
    return {path: np.sum([part[path].b @ part[path].a for part in parts], axis=0) for path in SIDES}


def empty() -> Grown:
    return Grown(AdapterState(LAYERS, values()), Drift(), 0.0)


def grown(*parts: dict[str, Factors], budget: int = 0, before: Grown | None = None) -> Grown:
    """The adapter after rounds that added `parts`, one each."""
    held, round_ = before or empty(), max((before or empty()).drift.ranks, default=0)
    for more in parts:
        round_ += 1
        held = residuals.grow(held.adapter, held.drift, round_, more, budget)
    return held


# What it looks like.


def test_a_residual_is_two_factors_on_each_module_in_order_of_path() -> None:
    spec = residuals.specification(LAYERS, (2, 5))
    assert spec.shapes == {"left.A": (2, 7), "left.B": (6, 2), "right.A": (5, 4), "right.B": (9, 5)}
    assert residuals.specification(LAYERS, ()).parameters == 0
    turned = AdapterSpec("base", "lora", LAYERS.modules[::-1])
    assert residuals.specification(turned, (2, 5)).shapes == spec.shapes


def test_modules_without_two_factors_have_no_residual() -> None:
    square = ModuleSpec("square", "lora_sb", 2, 1.0, (("A", (2, 3)), ("B", (3, 2)), ("R", (2, 2))))
    spec = AdapterSpec("base", "lora", (LAYERS.modules[0], square))
    assert residuals.specification(spec, ()).shapes == {}


def test_ranks_are_in_order_of_path() -> None:
    held = grown({"right": drawn(3, 0)["right"], "left": drawn(1, 0)["left"]}).adapter.residual
    assert residuals.ranks_of(held) == (1, 3)
    assert residuals.ranks_of({}) == ()


def test_a_path_that_goes_on_after_a_hyphen_is_in_order_of_path_too() -> None:
    # "q" is before "q-2", but "q.A" is after "q-2.A".
    modules = tuple(ModuleSpec(path, "lora", 1, 1.0, (("A", (1, 3)), ("B", (3, 1)))) for path in ("q", "q-2"))
    spec = AdapterSpec("base", "lora", modules)
    adapter = AdapterState(spec, {key: np.zeros(shape, np.float32) for key, shape in spec.shapes.items()})
    more = {"q": Factors(np.ones((3, 1)), np.ones((1, 3))), "q-2": Factors(np.ones((3, 2)), np.ones((2, 3)))}
    held = residuals.grow(adapter, Drift(), 1, more, 0).adapter.residual
    ranks = residuals.ranks_of(held)
    assert ranks == (1, 2)
    residuals.specification(spec, ranks).require(held, "residual")


# How it grows.


@given(st.lists(st.integers(0, 2), min_size=1, max_size=2), st.integers(0, 99))
def test_without_a_budget_products_add_up_to_the_last_bit_of_float32(ranks: list[int], seed: int) -> None:
    parts = [drawn(rank, seed + at) for at, rank in enumerate(ranks)]
    held = grown(*parts)
    assert residuals.ranks_of(held.adapter.residual) == (sum(ranks),) * 2
    assert held.dropped == 0.0
    assert held.drift == Drift(0, {at + 1: (sum(ranks[: at + 1]),) * 2 for at in range(len(ranks))})
    for path, expected in added(*parts).items():
        np.testing.assert_allclose(dense(held.adapter.residual)[path], expected, atol=1e-5)
    residuals.specification(LAYERS, (sum(ranks),) * 2).require(held.adapter.residual, "residual")


def test_older_columns_do_not_change_by_a_bit() -> None:
    first = grown(drawn(2, 0))
    second = grown(drawn(1, 1), before=first)
    for path in SIDES:
        assert second.adapter.residual[f"{path}.A"][:2].tobytes() == first.adapter.residual[f"{path}.A"].tobytes()
        older = np.ascontiguousarray(second.adapter.residual[f"{path}.B"][:, :2])
        assert older.tobytes() == np.ascontiguousarray(first.adapter.residual[f"{path}.B"]).tobytes()


@given(st.integers(1, 6), st.integers(0, 99))
def test_past_the_smaller_side_nothing_is_lost_and_all_is_rewritten(rank: int, seed: int) -> None:
    parts = [drawn(rank, seed + at) for at in range(4)]
    held = grown(*parts)
    assert residuals.ranks_of(held.adapter.residual) == (min(4 * rank, 6), min(4 * rank, 4))
    assert held.drift.epoch > 0 or rank == 1
    for path, expected in added(*parts).items():
        gap = np.linalg.norm(dense(held.adapter.residual)[path] - expected)
        assert gap <= 1e-6 * np.linalg.norm(expected)
    assert held.dropped <= 1e-6 * max(np.linalg.norm(whole) for whole in added(*parts).values())


@given(st.integers(1, 5), st.integers(1, 4), st.integers(0, 99))
def test_with_a_budget_what_is_dropped_is_the_dense_tail(budget: int, rank: int, seed: int) -> None:
    parts = [drawn(rank, seed), drawn(rank, seed + 1)]
    held = grown(parts[0], budget=budget)
    before = dense(held.adapter.residual)
    held = grown(parts[1], budget=budget, before=held)
    squares = 0.0
    for path, addition in added(parts[1]).items():
        whole = before[path] + addition
        u, s, vt = np.linalg.svd(whole)
        kept = min(budget, *SIDES[path])
        best = (u[:, :kept] * s[:kept]) @ vt[:kept]
        assert np.linalg.norm(dense(held.adapter.residual)[path] - best) <= 1e-6 * np.linalg.norm(s)
        squares += float((s[kept:] ** 2).sum())
    assert held.dropped == pytest.approx(np.sqrt(squares), rel=1e-6, abs=1e-6)
    assert all(have <= budget for have in residuals.ranks_of(held.adapter.residual))


def test_a_budget_that_is_not_reached_changes_nothing() -> None:
    parts = [drawn(1, 0), drawn(1, 1)]
    bounded, free = grown(*parts, budget=2), grown(*parts)
    assert bits(bounded.adapter.residual) == bits(free.adapter.residual)
    assert bounded.drift == free.drift


def test_a_new_epoch_begins_when_columns_are_rewritten_and_older_ranks_are_of_no_use() -> None:
    held = grown(drawn(1, 0), drawn(1, 1), budget=2)
    assert (held.drift.epoch, sorted(held.drift.ranks)) == (0, [1, 2])
    held = grown(drawn(1, 2), budget=2, before=held)
    assert held.drift == Drift(3, {3: (2, 2)})
    held = grown(drawn(0, 3), budget=2, before=held)
    assert held.drift == Drift(3, {3: (2, 2), 4: (2, 2)})


def test_one_module_past_the_budget_begins_an_epoch_for_all() -> None:
    held = grown(drawn(1, 0), budget=1)
    held = residuals.grow(held.adapter, held.drift, 2, {"left": drawn(1, 1)["left"]}, 1)
    assert held.drift == Drift(2, {2: (1, 1)})


def test_products_of_low_rank_survive_a_budget() -> None:
    """Three rounds that move along the same two directions fit a budget of two."""
    directions = drawn(2, 0)
    random, parts = np.random.default_rng(1), []
    for _ in range(3):
        mixing = random.standard_normal((2, 2))
        parts.append({path: Factors(one.b @ mixing, one.a) for path, one in directions.items()})
    held = grown(*parts, budget=2)
    for path, expected in added(*parts).items():
        gap = np.linalg.norm(dense(held.adapter.residual)[path] - expected)
        assert gap <= 1e-6 * np.linalg.norm(expected)
    assert held.dropped <= 1e-5


def test_what_is_dropped_is_over_all_modules() -> None:
    """‖(3, 4)‖ of a tail of 3 on one module and 4 on the other."""
    more = {
        "left": Factors(np.eye(6)[:, :2] * [5.0, 3.0], np.eye(7)[:2]),
        "right": Factors(np.eye(9)[:, :2] * [9.0, 4.0], np.eye(4)[:2]),
    }
    assert grown(more, budget=1).dropped == pytest.approx(5.0)


def test_the_adapter_itself_and_what_went_in_stay_as_they_are() -> None:
    first = grown(drawn(1, 0))
    held, more = bits(first.adapter.residual), drawn(2, 1)
    copies = {path: (one.b.copy(), one.a.copy()) for path, one in more.items()}
    second = grown(more, before=first, budget=1)
    assert second.adapter.tensors is first.adapter.tensors
    assert second.adapter.spec is LAYERS
    assert bits(first.adapter.residual) == held
    assert first.drift == Drift(0, {1: (1, 1)})
    assert all(np.array_equal(more[path].b, b) and np.array_equal(more[path].a, a) for path, (b, a) in copies.items())


def test_float32_on_the_wire_is_what_the_server_holds() -> None:
    assert {value.dtype for value in grown(drawn(1, 0), budget=1).adapter.residual.values()} == {np.dtype(np.float32)}


# How it is sent.


@given(st.integers(0, 4), st.integers(0, 4), st.integers(0, 99))
def test_what_is_held_and_what_comes_after_are_the_whole(left: int, right: int, seed: int) -> None:
    whole = grown(drawn(4, seed)).adapter.residual
    start = (left, right)
    more = residuals.after(whole, start)
    residuals.specification(LAYERS, (4 - left, 4 - right)).require(more, "columns")
    held = {f"{path}.A": whole[f"{path}.A"][:rank] for path, rank in zip(SIDES, start, strict=True)}
    held |= {f"{path}.B": whole[f"{path}.B"][:, :rank] for path, rank in zip(SIDES, start, strict=True)}
    assert bits(residuals.joined(held, start, more)) == bits(whole)
    # More may be held than is counted on, or nothing where nothing is.
    assert bits(residuals.joined(whole, start, more)) == bits(whole)
    if not any(start):
        assert bits(residuals.joined({}, start, more)) == bits(whole)


def test_ranks_after_rounds_that_nobody_is_at_are_forgotten() -> None:
    drift = Drift(2, {2: (1, 1), 3: (2, 2), 5: (3, 3)})
    assert residuals.forget(drift, {5, 3, 9}) == Drift(2, {3: (2, 2), 5: (3, 3)})
    assert drift.ranks.keys() == {2, 3, 5}
