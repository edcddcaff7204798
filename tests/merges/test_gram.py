"""Gram matrices against dense products, and what a change of gauge does to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.adapters import Factors, ModuleSpec, Tensors
from fedpeft.merges import gram, robust
from fedpeft.randomness import rng


def random_product(random: np.random.Generator, outputs: int, inputs: int, rank: int) -> Factors:
    return Factors(random.standard_normal((outputs, rank)), random.standard_normal((rank, inputs)))


def dense_gram(matrices: Sequence[np.ndarray]) -> np.ndarray:
    return np.array([[np.sum(one * other) for other in matrices] for one in matrices])


def lora_module(path: str, outputs: int, inputs: int, rank: int) -> ModuleSpec:
    return ModuleSpec(path, "lora", rank, 1.0, (("A", (rank, inputs)), ("B", (outputs, rank))))


def lora_tensors(random: np.random.Generator, path: str, outputs: int, inputs: int, rank: int) -> Tensors:
    shapes = {f"{path}.A": (rank, inputs), f"{path}.B": (outputs, rank)}
    return {key: random.standard_normal(shape).astype(np.float32) for key, shape in shapes.items()}


def dense(tensors: Tensors, path: str) -> np.ndarray:
    return tensors[f"{path}.B"].astype(np.float64) @ tensors[f"{path}.A"].astype(np.float64)


def moved(tensors: Tensors, delta: Tensors) -> Tensors:
    return {key: value.astype(np.float64) + delta.get(key, 0.0) for key, value in tensors.items()}


def test_a_golden_by_hand() -> None:
    # [1; 2][3 4] = [3 4; 6 8] and [0; 1][1 1] = [0 0; 1 1]: inner product 6 + 8, squares 9 + 16 + 36 + 64 and 1 + 1.
    one = Factors(np.array([[1.0], [2.0]]), np.array([[3.0, 4.0]]))
    other = Factors(np.array([[0.0], [1.0]]), np.array([[1.0, 1.0]]))
    np.testing.assert_allclose(gram.product_gram([{"q": one}, {"q": other}]), [[125, 14], [14, 2]], rtol=1e-14)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=6), st.integers(1, 6), st.integers(1, 6), st.integers(0, 10**6))
def test_it_is_the_dense_gram_at_any_ranks_and_with_modules_missing(
    ranks: list[int], outputs: int, inputs: int, seed: int
) -> None:
    random = rng(seed, "gram")
    updates: list[dict[str, Factors]] = [{} for _ in ranks]
    matrices = [np.zeros((2, outputs, inputs)) for _ in ranks]
    for update, matrix, rank in zip(updates, matrices, ranks, strict=True):
        for at, path in enumerate(("k", "q")):
            if random.random() < 0.8:
                update[path] = random_product(random, outputs, inputs, rank)
                matrix[at] = update[path].b @ update[path].a
    found = gram.product_gram(updates)
    np.testing.assert_allclose(found, dense_gram(matrices), rtol=1e-11, atol=1e-11)
    assert np.array_equal(found, found.T)


def test_a_change_is_what_the_products_differ_by() -> None:
    random = rng(0, "change")
    before, after = (random_product(random, 7, 5, 3) for _ in range(2))
    change = gram.product_change(before, after)
    np.testing.assert_allclose(change.b @ change.a, after.b @ after.a - before.b @ before.a, atol=1e-13)
    assert change.rank == 6


def test_a_frozen_factor_costs_no_rank() -> None:
    random = rng(0, "frozen")
    before, other = (random_product(random, 7, 5, 3) for _ in range(2))
    for after in (Factors(other.b, before.a), Factors(before.b, other.a)):
        change = gram.product_change(before, after)
        np.testing.assert_allclose(change.b @ change.a, after.b @ after.a - before.b @ before.a, atol=1e-13)
        assert change.rank == 3
    still = gram.product_change(before, before)
    assert (still.rank, still.shape) == (0, (7, 5))


def test_a_small_change_of_a_large_product_keeps_its_digits() -> None:
    # (2^20 + 2^-20)^2 - 2^40 = 2 + 2^-40, of which a difference of the products' squares, 2^80, keeps nothing.
    large, small = 2.0**20, 2.0**-20
    before = Factors(np.array([[large]]), np.array([[large]]))
    after = Factors(np.array([[large + small]]), np.array([[large + small]]))
    found = gram.product_gram([{"q": gram.product_change(before, after)}])
    assert found[0, 0] == pytest.approx((2 + 2.0**-40) ** 2, rel=1e-14)


def test_vast_terms_that_cancel_do_not_hide_the_length_of_an_update() -> None:
    random = rng(0, "cancel")
    honest = [random_product(random, 9, 8, 2) for _ in range(3)]
    attack = random_product(random, 9, 8, 2)
    vast, shear = 2.0**33 * random.standard_normal((9, 2)), np.array([[1.0, 1], [0, 1]])
    mixed = np.linalg.inv(shear) @ honest[0].a
    hidden = Factors(np.hstack([attack.b, vast, -vast @ shear]), np.vstack([attack.a, honest[0].a, mixed]))
    found = gram.product_gram([{"q": one} for one in (*honest, hidden)])
    expected = dense_gram([one.b @ one.a for one in (*honest, attack)])
    np.testing.assert_allclose(found, expected, atol=1e-2)


@given(st.integers(1, 4), st.integers(0, 10**6))
def test_a_gauge_moves_no_verdict(rank: int, seed: int) -> None:
    random = rng(seed, "gauge")
    module, clients = lora_module("q", 6, 5, rank), 9
    received = lora_tensors(random, "q", 6, 5, rank)
    plain, turned = [], []
    for _ in range(clients):
        after = moved(received, lora_tensors(random, "q", 6, 5, rank))
        r = np.linalg.qr(random.standard_normal((rank, rank)))[0] * random.uniform(1, 30)
        other = {"q.A": r @ after["q.A"], "q.B": after["q.B"] @ np.linalg.inv(r)}
        plain.append({key: value - received[key] for key, value in after.items()})
        turned.append({key: value - received[key] for key, value in other.items()})
    first, second = (gram.update_gram([module], [received] * clients, deltas) for deltas in (plain, turned))
    np.testing.assert_allclose(first, second, rtol=1e-9, atol=1e-9)
    weights = random.uniform(1, 5, clients)
    for judge in (robust.krum(2), robust.multi_krum(3), robust.geometric_median(), robust.norm_bound()):
        for one, two in zip(judge.judge(first, weights), judge.judge(second, weights), strict=True):
            np.testing.assert_allclose(one, two, atol=1e-6)
    assert not np.allclose(gram.flat_gram(plain), gram.flat_gram(turned), rtol=1e-2)


def test_inflated_factors_of_the_central_update_turn_krum_away_from_it_on_raw_tensors_alone() -> None:
    random = rng(3, "inflated")
    received, common = (lora_tensors(random, "q", 6, 5, 2) for _ in range(2))
    noisy = [{key: value + 0.1 * random.standard_normal(value.shape) for key, value in common.items()} for _ in "1234"]
    after = moved(received, common)
    inflated = {"q.A": 30 * after["q.A"] - received["q.A"], "q.B": after["q.B"] / 30 - received["q.B"]}
    deltas, weights = [inflated, *noisy], np.ones(5)
    by_product = gram.update_gram([lora_module("q", 6, 5, 2)], [received] * 5, deltas)
    assert robust.krum(1).judge(by_product, weights).weights[0] == 1.0
    assert robust.krum(1).judge(gram.flat_gram([common, *noisy]), weights).weights[0] == 1.0
    assert robust.krum(1).judge(gram.flat_gram(deltas), weights).weights[0] == 0.0


def test_an_update_is_products_where_it_can_be_and_raw_tensors_elsewhere() -> None:
    random = rng(1, "update")
    modules = [lora_module("q", 6, 5, 4), lora_module("v", 3, 5, 4)]
    received: list[Mapping[str, np.ndarray]] = []
    deltas: list[Mapping[str, np.ndarray]] = []
    for rank in (1, 2, 4):
        kept = {**lora_tensors(random, "q", 6, 5, rank), **lora_tensors(random, "v", 3, 5, rank)}
        received.append({**kept, "head.weight": random.standard_normal((2, 5)).astype(np.float32)})
        deltas.append(
            {key: random.standard_normal(value.shape).astype(np.float32) for key, value in received[-1].items()}
        )
    deltas[1] = {key: value for key, value in deltas[1].items() if key != "q.A"}
    deltas[2] = {key: value for key, value in deltas[2].items() if not key.startswith("v.")}
    received[0] = {key: value for key, value in received[0].items() if not key.startswith("v.")}
    deltas[0] = {key: value for key, value in deltas[0].items() if not key.startswith("v.")}
    flat = []
    for before, delta in zip(received, deltas, strict=True):
        after, parts = moved(before, delta), [delta["head.weight"].astype(np.float64).ravel()]
        for path, shape in (("q", (6, 5)), ("v", (3, 5))):
            change = dense(after, path) - dense(before, path) if f"{path}.A" in before else np.zeros(shape)
            parts.append(change.ravel())
        flat.append(np.concatenate(parts))
    np.testing.assert_allclose(gram.update_gram(modules, received, deltas), dense_gram(flat), rtol=1e-12)


def test_a_trained_core_between_frozen_factors_is_a_product_too() -> None:
    random = rng(2, "core")
    shapes = {"A": (2, 5), "B": (6, 2), "R": (2, 2)}
    module = ModuleSpec("q", "lora_sb", 2, 1.0, tuple(shapes.items()))
    received = {f"q.{name}": random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    deltas = [{"q.R": random.standard_normal((2, 2)).astype(np.float32)} for _ in range(3)]
    wide = {key: value.astype(np.float64) for key, value in received.items()}
    expected = dense_gram([wide["q.B"] @ delta["q.R"] @ wide["q.A"] for delta in deltas])
    np.testing.assert_allclose(gram.update_gram([module], [received] * 3, deltas), expected, rtol=1e-12)


def test_raw_tensors_add_up_over_keys_and_over_blocks() -> None:
    random = rng(0, "flat")
    long = [random.standard_normal(3 * 2**16 + 5).astype(np.float32) for _ in range(3)]
    deltas: list[Tensors] = [{"long": value, "scalar": np.float32(at + 1).reshape(())} for at, value in enumerate(long)]
    deltas[1] = {"long": long[1]}
    expected = dense_gram([value.astype(np.float64) for value in long])
    expected[np.ix_([0, 2], [0, 2])] += np.outer([1, 3], [1, 3])
    np.testing.assert_allclose(gram.flat_gram(deltas), expected, rtol=1e-12)


@given(st.permutations(range(5)))
def test_the_order_of_clients_is_the_order_of_rows(order: list[int]) -> None:
    random = rng(0, "order")
    updates = [{"q": random_product(random, 4, 6, rank)} for rank in (1, 3, 2, 8, 1)]
    whole = gram.product_gram(updates)
    np.testing.assert_allclose(
        gram.product_gram([updates[at] for at in order]), whole[np.ix_(order, order)], rtol=1e-12
    )


def test_no_update_is_changed_by_being_looked_at() -> None:
    random = rng(0, "still")
    received, delta = (lora_tensors(random, "q", 4, 4, 2) for _ in range(2))
    copies = [{key: value.copy() for key, value in tensors.items()} for tensors in (received, delta)]
    gram.update_gram([lora_module("q", 4, 4, 2)], [received, received], [delta, delta])
    for tensors, copy in zip((received, delta), copies, strict=True):
        for key, value in tensors.items():
            np.testing.assert_array_equal(value, copy[key])
