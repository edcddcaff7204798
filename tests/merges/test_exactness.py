"""The factored error against the dense one, and against rules whose error is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.adapters import AdapterSpec, ModuleSpec, Tensors
from fedpeft.merges import exactness
from fedpeft.merges.exactness import Factors
from fedpeft.randomness import rng


def spec_of(outputs: int, inputs: int, rank: int) -> AdapterSpec:
    shapes = (("A", (rank, inputs)), ("B", (outputs, rank)))
    head = ModuleSpec("head", "full", 0, 1.0, (("weight", (2, inputs)),))
    return AdapterSpec("base", "lora", (ModuleSpec("q", "lora", rank, 1.0, shapes), head))


def adapters(outputs: int, inputs: int, rank: int, clients: int, seed: int = 0) -> list[Tensors]:
    random, shapes = rng(seed, "adapters"), spec_of(outputs, inputs, rank).shapes
    return [
        {key: random.standard_normal(shape).astype(np.float32) for key, shape in shapes.items()} for _ in range(clients)
    ]


NOTHING = {key: np.zeros(1, np.float32) for key in ("q.A", "q.B", "v.A", "v.B")}
"""What all received, in most tests: zeros of any shape."""


def target_of(clients: list[Tensors], weights: list[float]) -> exactness.Target:
    target = exactness.begin()
    for client, weight in zip(clients, weights, strict=True):
        target = exactness.add(target, ("q",), NOTHING, client, weight)
    return target


def dense(clients: list[Tensors], weights: list[float]) -> np.ndarray:
    products = [
        w * c["q.B"].astype(np.float64) @ c["q.A"].astype(np.float64) for c, w in zip(clients, weights, strict=True)
    ]
    return sum(products) / sum(weights)


def mean_of(clients: list[Tensors], weights: list[float]) -> Tensors:
    return {
        key: sum(w * c[key].astype(np.float64) for c, w in zip(clients, weights, strict=True)) / sum(weights)
        for key in clients[0]
    }


@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 4), st.integers(1, 9), st.integers(0, 99))
def test_it_is_the_dense_error_for_any_shape_rank_and_number_of_clients(
    outputs: int, inputs: int, rank: int, clients: int, seed: int
) -> None:
    found = adapters(outputs, inputs, rank, clients, seed)
    weights = [float(at + 1) for at in range(clients)]
    merged = mean_of(found, weights)
    exact = dense(found, weights)
    expected = np.linalg.norm(merged["q.B"] @ merged["q.A"] - exact) / np.linalg.norm(exact)
    assert exactness.errors(target_of(found, weights), NOTHING, merged).by_module["q"] == pytest.approx(
        expected, rel=1e-9, abs=1e-12
    )


def test_a_golden_by_hand() -> None:
    # B_1 A_1 = 1 x 1 and B_2 A_2 = 3 x 3: their mean is 5, the mean of factors gives 2 x 2 = 4.
    one, two = ({key: np.full((1, 1), value, np.float32) for key in ("q.A", "q.B")} for value in (1.0, 3.0))
    assert exactness.errors(target_of([one, two], [1, 1]), NOTHING, mean_of([one, two], [1, 1])).by_module[
        "q"
    ] == pytest.approx(1 / 5)


def test_one_client_and_a_shared_factor_are_exact() -> None:
    found = adapters(7, 5, 2, 3)
    assert exactness.errors(target_of(found[:1], [3.0]), NOTHING, found[0]).overall < 1e-15
    frozen = [{**client, "q.A": found[0]["q.A"]} for client in found]
    weights = [0.5, 0.3, 0.2]
    assert exactness.errors(target_of(frozen, weights), NOTHING, mean_of(frozen, weights)).overall < 1e-14


def test_memory_does_not_grow_with_the_number_of_clients() -> None:
    found = adapters(7, 5, 2, 40)
    target = target_of(found, [1.0] * 40)
    assert target.sums["q"].b.shape == (7, 5)
    assert target.sums["q"].a.shape == (5, 5)


@pytest.mark.parametrize(("outputs", "inputs"), [(7, 5), (5, 7), (6, 6)])
def test_folding_loses_nothing(outputs: int, inputs: int) -> None:
    random = rng(1, "fold")
    product = Factors(random.standard_normal((outputs, 11)), random.standard_normal((11, inputs)))
    small = exactness.folded(product)
    assert small.b.shape[1] == min(outputs, inputs)
    np.testing.assert_allclose(small.b @ small.a, product.b @ product.a, atol=1e-12)


def test_a_gauge_changes_no_verdict() -> None:
    found = adapters(7, 5, 2, 3)
    turned = [{**client, "q.A": client["q.A"] * 4, "q.B": client["q.B"] / 4} for client in found]
    merged = mean_of(found, [1, 1, 1])
    first, second = (
        exactness.errors(target_of(clients, [1, 1, 1]), NOTHING, merged).overall for clients in (found, turned)
    )
    assert first == pytest.approx(second, rel=1e-12)


def test_the_whole_weighs_modules_by_their_size() -> None:
    small = {"q.A": np.ones((1, 1), np.float32), "q.B": np.ones((1, 1), np.float32)}
    target = exactness.Target(
        1.0, {"q": Factors(np.ones((1, 1)), np.ones((1, 1))), "v": Factors(np.ones((1, 1)), 3 * np.ones((1, 1)))}
    )
    merged = {**small, "v.A": np.zeros((1, 1), np.float32), "v.B": np.zeros((1, 1), np.float32)}
    found = exactness.errors(target, NOTHING, merged)
    assert found == (pytest.approx(math.sqrt(9 / 10)), {"q": 0.0, "v": 1.0})


def test_nothing_at_all_has_no_error() -> None:
    zero = {"q.A": np.ones((1, 3), np.float32), "q.B": np.zeros((2, 1), np.float32)}
    assert math.isnan(exactness.errors(target_of([zero], [1.0]), NOTHING, zero).by_module["q"])


def test_modules_with_a_factor_that_stays_at_its_client_are_left_out() -> None:
    spec = spec_of(3, 3, 1)
    assert exactness.measured_modules(spec, ()) == ("q",)
    assert exactness.measured_modules(spec, ("q.B",)) == ()
    assert exactness.measured_modules(spec, ("head.weight",)) == ("q",)


def test_a_factor_that_does_not_travel_counts_as_it_was_received() -> None:
    found = adapters(7, 5, 2, 3)
    received = {**NOTHING, "q.A": found[0]["q.A"]}
    target = exactness.begin()
    for client in found:
        target = exactness.add(target, ("q",), received, {"q.B": client["q.B"]}, 1.0)
    merged = {"q.B": mean_of(found, [1, 1, 1])["q.B"]}
    assert exactness.errors(target, received, merged).overall < 1e-14
