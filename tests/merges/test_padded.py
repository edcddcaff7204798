from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.merges import MISSING, padded

SHAPES = {"a": (3, 2), "r": (3, 3)}
Client = tuple[float, int]
"""Weight and rank."""

clients = st.lists(st.tuples(st.floats(0.1, 10), st.integers(1, 3)), min_size=1, max_size=5)


def corner(key: str, rank: int) -> tuple[slice, ...]:
    return (slice(rank), slice(2)) if key == "a" else (slice(rank), slice(rank))


def deltas(found: Sequence[Client], seed: int = 0) -> list[dict[str, np.ndarray]]:
    random = np.random.default_rng(seed)
    whole = [{key: random.standard_normal(shape).astype(np.float32) for key, shape in SHAPES.items()} for _ in found]
    return [
        {key: value[corner(key, rank)] for key, value in one.items()}
        for one, (_, rank) in zip(whole, found, strict=True)
    ]


def summed(found: Sequence[Client], own: Sequence[dict[str, np.ndarray]]) -> padded.Sums:
    sums = padded.begin(SHAPES)
    for (weight, _), delta in zip(found, own, strict=True):
        sums = padded.add(sums, delta, weight)
    return sums


BEFORE = {
    "a": np.arange(1, 7, dtype=np.float32).reshape(3, 2),
    "r": np.arange(1, 10, dtype=np.float32).reshape(3, 3),
}


@given(clients, st.sampled_from(MISSING), st.integers(0, 99))
def test_it_is_the_mean_of_what_clients_hold_padded_with_zeros(found: list[Client], missing: str, seed: int) -> None:
    own, total = deltas(found, seed), sum(weight for weight, _ in found)
    moved = padded.mean(summed(found, own), BEFORE, total, missing)
    for key, shape in SHAPES.items():
        held, weight = np.zeros(shape), np.zeros(shape)
        for (share, rank), delta in zip(found, own, strict=True):
            held[corner(key, rank)] += share * (BEFORE[key][corner(key, rank)] + delta[key].astype(float))
            weight[corner(key, rank)] += share
        kept = BEFORE[key].astype(float)
        covered = np.divide(held, weight, out=kept.copy(), where=weight > 0)
        expected = held / total if missing == "zero" else covered
        np.testing.assert_allclose(kept + moved[key], expected, rtol=1e-5, atol=1e-5)
        assert moved[key].dtype == np.float32


def test_a_row_that_one_of_two_lacks_by_hand() -> None:
    # Rows 1 and 2 are held by both, row 3 by the second alone, which weighs 3 of 4.
    own = [{"a": np.full((2, 2), 4, np.float32)}, {"a": np.full((3, 2), 8, np.float32)}]
    sums = padded.add(padded.add(padded.begin({"a": (3, 2)}), own[0], 1.0), own[1], 3.0)
    before = {"a": np.full((3, 2), 2, np.float32)}
    # 2 + 4 and 2 + 8 at 1 and 3: 9. The last row counts as 0 for the first: (3 × 10 + 0) / 4 = 7.5.
    assert (2 + padded.mean(sums, before, 4.0, "zero")["a"]).tolist() == [[9, 9], [9, 9], [7.5, 7.5]]
    assert (2 + padded.mean(sums, before, 4.0, "covered")["a"]).tolist() == [[9, 9], [9, 9], [10, 10]]


@pytest.mark.parametrize("missing", MISSING)
def test_what_nobody_holds(missing: str) -> None:
    sums = padded.add(padded.begin({"a": (3, 2)}), {"a": np.ones((1, 2), np.float32)}, 2.0)
    moved = padded.mean(sums, BEFORE, 2.0, missing)["a"]
    # It stays where it was, or is nothing from now on.
    left = BEFORE["a"][1:] if missing == "covered" else np.zeros((2, 2))
    assert (BEFORE["a"] + moved)[1:].tolist() == left.tolist()


@pytest.mark.parametrize("missing", MISSING)
def test_a_tensor_that_a_client_lacks_altogether(missing: str) -> None:
    sums = padded.add(padded.begin({"a": (3, 2)}), {"a": np.full((3, 2), 6, np.float32)}, 1.0)
    sums = padded.add(sums, {}, 2.0)
    after = BEFORE["a"] + padded.mean(sums, BEFORE, 3.0, missing)["a"]
    expected = (BEFORE["a"] + 6) / 3 if missing == "zero" else BEFORE["a"] + 6
    np.testing.assert_allclose(after, expected, rtol=1e-6)


def test_a_tensor_that_nobody_was_to_send_is_passed_over() -> None:
    sums = padded.add(padded.begin({"a": (3, 2)}), {"b": np.ones((3, 2), np.float32)}, 1.0)
    assert list(padded.mean(sums, BEFORE, 1.0, "zero")) == ["a"]


@pytest.mark.parametrize("missing", MISSING)
@given(st.lists(st.floats(0.001, 1e9), min_size=1, max_size=6))
def test_where_all_hold_all_the_adapter_before_plays_no_part(missing: str, weights: list[float]) -> None:
    found = [(weight, 3) for weight in weights]
    own = deltas(found)
    huge = {key: np.full(shape, 1e30, np.float32) for key, shape in SHAPES.items()}
    moved = padded.mean(summed(found, own), huge, sum(weights), missing)
    for key in SHAPES:
        expected = sum(w * delta[key].astype(float) for w, delta in zip(weights, own, strict=True)) / sum(weights)
        np.testing.assert_allclose(moved[key], expected, rtol=1e-5, atol=1e-5)


def test_sums_are_not_changed_by_what_is_added() -> None:
    first = padded.begin(SHAPES)
    second = padded.add(first, deltas([(1.0, 3)])[0], 1.0)
    padded.add(second, deltas([(1.0, 2)], 1)[0], 5.0)
    assert not any(np.any(value) for value in first.deltas.values())
    assert all(value.shape == () for value in second.covered.values())
