"""What modules of each kind do, in factors, against dense float64 by the formulas of the papers."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.adapters import KINDS, algebra
from fedpeft.adapters.algebra import Factors, Tensor
from fedpeft.merges import products

Shapes = Mapping[str, tuple[int, ...]]
Numbers = dict[str, np.ndarray]

sides = st.integers(1, 6)
ranks = st.integers(1, 4)
seeds = st.integers(0, 2**31)
sizes = st.sampled_from([1e-6, 1.0, 1e6])

FORMS: Mapping[str, Callable[[int, int, int], Shapes]] = {
    "lora": lambda out, inputs, rank: {"A": (rank, inputs), "B": (out, rank)},
    "lora_sb": lambda out, inputs, rank: {"A": (rank, inputs), "B": (out, rank), "R": (rank, rank)},
    "adalora": lambda out, inputs, rank: {"A": (rank, inputs), "B": (out, rank), "E": (rank, 1)},
    "loha": lambda out, inputs, rank: {
        "w1_a": (out, rank),
        "w1_b": (rank, inputs),
        "w2_a": (out, rank),
        "w2_b": (rank, inputs),
    },
    "lokr": lambda out, inputs, rank: {"w1": (out, inputs), "w2": (inputs + 1, rank)},
    "vera": lambda out, inputs, rank: {"b": (out,), "d": (rank,)},
}
"""The tensors of a module of each kind."""

SOLVED = [name for name in FORMS if KINDS[name].solve]


def drawn(shapes: Shapes, seed: int, size: float = 1.0) -> Numbers:
    random = np.random.default_rng(seed)
    return {name: size * random.standard_normal(shape) for name, shape in shapes.items()}


def by(numbers: Numbers) -> Tensor:
    return numbers.__getitem__


def product(kind: str, numbers: Numbers) -> Factors:
    make = KINDS[kind].product
    assert make is not None
    found = make(by(numbers), list(numbers))
    assert found.b.dtype == found.a.dtype == np.float64
    assert found.b.shape[-1] == found.a.shape[-2] == found.rank
    return found


def dense(factors: Factors) -> np.ndarray:
    found: np.ndarray = factors.b @ factors.a
    return found


def solved(kind: str, after: Factors, numbers: Numbers) -> Numbers:
    solve = KINDS[kind].solve
    assert solve is not None
    shapes = {name: value.shape for name, value in numbers.items()}
    before = {name: value.copy() for name, value in numbers.items()}
    found = solve(after, by(numbers), shapes)
    assert {name: value.shape for name, value in found.items()} == shapes
    assert all(np.array_equal(numbers[name], before[name]) for name in numbers), "an input was written to"
    return dict(found)


def near(found: np.ndarray, wanted: np.ndarray, size: float = 0.0) -> None:
    assert found.shape == wanted.shape
    assert np.isfinite(found).all()
    assert np.linalg.norm(found - wanted) <= 1e-12 * max(size, float(np.linalg.norm(wanted)), 1e-300)


# What a module does.


@given(sides, sides, ranks, seeds)
def test_two_and_three_factors_are_their_products(out: int, inputs: int, rank: int, seed: int) -> None:
    two = drawn(FORMS["lora"](out, inputs, rank), seed)
    near(dense(product("lora", two)), two["B"] @ two["A"])
    three = drawn(FORMS["lora_sb"](out, inputs, rank), seed)
    near(dense(product("lora_sb", three)), three["B"] @ three["R"] @ three["A"])


@given(sides, sides, ranks, seeds)
def test_singular_triplets_are_scaled_one_by_one(out: int, inputs: int, rank: int, seed: int) -> None:
    numbers = drawn(FORMS["adalora"](out, inputs, rank), seed)
    wanted = numbers["B"] @ np.diag(numbers["E"][:, 0]) @ numbers["A"]
    near(dense(product("adalora", numbers)), wanted, float(np.linalg.norm(numbers["B"])))


@given(sides, sides, ranks, ranks, seeds)
def test_two_products_number_by_number_are_one_of_all_pairs(
    out: int, inputs: int, first: int, second: int, seed: int
) -> None:
    shapes = {"w1_a": (out, first), "w1_b": (first, inputs), "w2_a": (out, second), "w2_b": (second, inputs)}
    numbers = drawn(shapes, seed)
    found = product("loha", numbers)
    wanted = (numbers["w1_a"] @ numbers["w1_b"]) * (numbers["w2_a"] @ numbers["w2_b"])
    near(dense(found), wanted, float(np.prod([np.linalg.norm(value) for value in numbers.values()])))
    assert found.rank == first * second


@given(sides, sides, sides, sides, st.sampled_from([0, 1, 2]), seeds)
def test_the_rearranged_kronecker_product_has_the_inner_products_of_the_real_one(
    rows: int, columns: int, inner_rows: int, inner_columns: int, rank: int, seed: int
) -> None:
    right = {"w2_a": (inner_rows, rank), "w2_b": (rank, inner_columns)} if rank else {"w2": (inner_rows, inner_columns)}
    one, other = (drawn({"w1": (rows, columns), **right}, seed + at) for at in range(2))
    whole = [np.kron(each["w1"], each["w2_a"] @ each["w2_b"] if rank else each["w2"]) for each in (one, other)]
    factors = [product("lokr", each) for each in (one, other)]
    scale = float(np.linalg.norm(whole[0]) * np.linalg.norm(whole[1]))
    assert abs(products.inner(*factors) - float(np.vdot(*whole))) <= 1e-12 * scale
    assert abs(products.frobenius(factors[0]) - np.linalg.norm(whole[0])) <= 1e-12 * np.linalg.norm(whole[0])
    summed = dense(products.stack(factors)).reshape(rows, columns, inner_rows, inner_columns)
    back = summed.transpose(0, 2, 1, 3).reshape(rows * inner_rows, columns * inner_columns)
    near(back, whole[0] + whole[1], scale**0.5)


@given(sides, ranks, seeds)
def test_vera_is_what_stands_between_the_fixed_matrices(out: int, rank: int, seed: int) -> None:
    numbers, random = drawn(FORMS["vera"](out, 1, rank), seed), np.random.default_rng(seed)
    fixed_b, fixed_a = random.standard_normal((out, rank)), random.standard_normal((rank, 5))
    wanted = np.diag(numbers["b"]) @ fixed_b @ np.diag(numbers["d"]) @ fixed_a
    near((fixed_b * dense(product("vera", numbers))) @ fixed_a, wanted, float(np.linalg.norm(fixed_b)))


# And back.


@pytest.mark.parametrize("kind", SOLVED)
@given(out=sides, inputs=sides, rank=ranks, seed=seeds, size=sizes)
def test_what_is_solved_from_what_a_module_does_does_it_again(
    kind: str, out: int, inputs: int, rank: int, seed: int, size: float
) -> None:
    shapes = FORMS[kind](out, inputs, rank)
    numbers, stood = drawn(shapes, seed, size), drawn(shapes, seed + 1)
    after = product(kind, numbers)
    keep = products.truncate(after, after.rank).factors
    near(dense(product(kind, solved(kind, after, stood))), dense(after), float(np.linalg.norm(after.b)) * 1e-3)
    near(dense(product(kind, solved(kind, keep, stood))), dense(after), products.frobenius(after) * 10)


@pytest.mark.parametrize("kind", SOLVED)
@given(out=sides, inputs=sides, rank=ranks, seed=seeds)
def test_nothing_is_solved_to_nothing_and_a_node_can_still_learn(
    kind: str, out: int, inputs: int, rank: int, seed: int
) -> None:
    stood = drawn(FORMS[kind](out, inputs, rank), seed)
    like = product(kind, stood)
    found = solved(kind, Factors(np.zeros_like(like.b), np.zeros_like(like.a)), stood)
    assert not dense(product(kind, found)).any()
    assert any(value.any() for value in found.values()), "all gradients would be zero from here on"


@pytest.mark.parametrize("kind", ["lora", "adalora"])
@given(out=sides, inputs=sides, rank=st.integers(2, 4), seed=seeds, kept=st.integers(0, 2))
def test_fewer_ranks_than_there_is_room_for_are_padded(
    kind: str, out: int, inputs: int, rank: int, seed: int, kept: int
) -> None:
    stood = drawn(FORMS[kind](out, inputs, rank), seed)
    after = products.truncate(product(kind, drawn(FORMS[kind](out, inputs, rank), seed + 1)), min(kept, rank)).factors
    near(dense(product(kind, solved(kind, after, stood))), dense(after), 1.0)


@given(sides, sides, st.integers(2, 4), seeds)
def test_a_pair_that_is_not_needed_keeps_what_it_can_learn_with(out: int, inputs: int, rank: int, seed: int) -> None:
    shapes = FORMS["lora"](out, inputs, rank)
    stood = drawn(shapes, seed)
    needed = products.truncate(product("lora", drawn(shapes, seed + 1)), 1).factors
    found = solved("lora", needed, stood)
    assert not found["B"][:, 1:].any()
    assert np.array_equal(found["A"][1:], stood["A"][1:])
    near(dense(product("lora", found)), dense(needed), 1.0)
    embedding = solved("lora", needed, {**stood, "A": np.zeros(shapes["A"])})
    assert not embedding["A"][1:].any()
    assert np.array_equal(embedding["B"][:, 1:], stood["B"][:, 1:])


@given(sides, sides, ranks, seeds)
def test_triplets_have_directions_of_norm_one_and_sizes_above_zero(out: int, inputs: int, rank: int, seed: int) -> None:
    stood = drawn(FORMS["adalora"](out, inputs, rank), seed)
    after = product("adalora", drawn(FORMS["adalora"](out, inputs, rank), seed + 1))
    found = solved("adalora", after, stood)
    assert np.allclose(np.linalg.norm(found["B"], axis=0), 1.0)
    assert np.allclose(np.linalg.norm(found["A"], axis=1), 1.0)
    assert (found["E"] >= 0).all()


@given(sides, sides, st.integers(2, 4), seeds)
def test_a_triplet_that_is_not_needed_keeps_its_directions(out: int, inputs: int, rank: int, seed: int) -> None:
    stood = drawn(FORMS["adalora"](out, inputs, rank), seed)
    after = product("adalora", stood)
    after.b[:, 0] = 0.0
    found = solved("adalora", after, stood)
    assert found["E"][0, 0] == 0.0
    assert np.array_equal(found["B"][:, 0], stood["B"][:, 0])
    assert np.array_equal(found["A"][0], stood["A"][0])
    near(dense(product("adalora", found)), dense(after), 1.0)


@given(sides, ranks, seeds, st.sampled_from([1.0, -1.0]), sizes)
def test_d_keeps_its_norm_and_its_side(out: int, rank: int, seed: int, sign: float, size: float) -> None:
    stood = drawn(FORMS["vera"](out, 1, rank), seed)
    numbers = drawn(FORMS["vera"](out, 1, rank), seed + 1, size)
    after = Factors(sign * numbers["b"][:, None], sign * numbers["d"][None])
    found = solved("vera", after, stood)
    assert np.isclose(np.linalg.norm(found["d"]), np.linalg.norm(stood["d"]))
    assert found["d"] @ stood["d"] >= 0
    near(dense(product("vera", found)), dense(after), products.frobenius(after))


@given(sides, ranks, seeds)
def test_a_d_of_zeros_stays_and_b_is_zero_with_it(out: int, rank: int, seed: int) -> None:
    stood = {**drawn(FORMS["vera"](out, 1, rank), seed), "d": np.zeros(rank)}
    found = solved("vera", product("vera", drawn(FORMS["vera"](out, 1, rank), seed + 1)), stood)
    assert not found["d"].any()
    assert not found["b"].any()


@given(sides, sides, sides, sides, st.integers(1, 3), seeds)
def test_a_kronecker_product_whose_right_side_is_low_rank_is_the_best_of_that_rank(
    rows: int, columns: int, inner_rows: int, inner_columns: int, rank: int, seed: int
) -> None:
    shapes = {"w1": (rows, columns), "w2_a": (inner_rows, rank), "w2_b": (rank, inner_columns)}
    after = product("lokr", drawn({"w1": (rows, columns), "w2": (inner_rows, inner_columns)}, seed))
    found = solved("lokr", after, drawn(shapes, seed + 1))
    right = after.a.reshape(inner_rows, inner_columns)
    values = np.linalg.svd(right, compute_uv=False)
    wanted = float(np.linalg.norm(after.b) * np.linalg.norm(values[rank:]))
    missed = float(np.linalg.norm(dense(product("lokr", found)) - dense(after)))
    assert abs(missed - wanted) <= 1e-10 * products.frobenius(after)


@given(sides, sides, ranks, seeds)
def test_of_more_than_one_pair_the_leading_one_is_taken(out: int, inputs: int, rank: int, seed: int) -> None:
    every = [product("lokr", drawn(FORMS["lokr"](out, inputs, rank), seed + at)) for at in range(3)]
    nearest = products.truncate(products.stack(every), 1)
    found = product("lokr", solved("lokr", nearest.factors, drawn(FORMS["lokr"](out, inputs, rank), seed)))
    missed = products.frobenius(products.difference(products.stack(every), found))
    assert abs(missed - nearest.spectrum.dropped) <= 1e-10 * nearest.spectrum.size


def test_by_hand() -> None:
    """A product [[6]] of b = 2 and a = 3, for a d that was −1, is d = −1 and b = −6."""
    found = algebra.as_outer(
        Factors(np.array([[2.0]]), np.array([[3.0]])), {"d": np.array([-1.0]), "b": np.array([9.0])}.__getitem__, {}
    )
    assert (float(found["b"][0]), float(found["d"][0])) == (-6.0, -1.0)
