"""Products in factored form against the same on dense matrices in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.adapters import Factors
from fedpeft.merges import products

sizes = st.integers(1, 12)


def drawn(outputs: int, inputs: int, rank: int, seed: int = 0, decay: float = 0.0) -> Factors:
    """A random product; with `decay`, singular values that fall off."""
    random = np.random.default_rng(seed)
    falling = np.exp(-decay * np.arange(rank))
    return Factors(random.standard_normal((outputs, rank)) * falling, random.standard_normal((rank, inputs)))


def dense(product: Factors) -> np.ndarray:
    whole: np.ndarray = product.b.astype(np.float64) @ product.a.astype(np.float64)
    return whole


def values(matrix: np.ndarray) -> np.ndarray:
    found: np.ndarray = np.linalg.svd(matrix, compute_uv=False)
    return found


# Algebra.


@given(sizes, sizes, st.lists(st.integers(0, 4), min_size=1, max_size=4), st.integers(0, 99))
def test_a_stack_is_the_sum_of_products(outputs: int, inputs: int, ranks: list[int], seed: int) -> None:
    parts = [drawn(outputs, inputs, rank, seed + at) for at, rank in enumerate(ranks)]
    whole = products.stack(parts)
    assert whole.rank == sum(ranks)
    assert whole.shape == (outputs, inputs)
    np.testing.assert_allclose(dense(whole), np.sum([dense(part) for part in parts], axis=0), atol=1e-12)


@given(sizes, sizes, st.integers(1, 5), st.integers(1, 5), st.integers(0, 99))
def test_inner_difference_scale_and_norm_are_the_dense_ones(
    outputs: int, inputs: int, rank: int, other: int, seed: int
) -> None:
    one, two = drawn(outputs, inputs, rank, seed), drawn(outputs, inputs, other, seed + 1)
    assert products.inner(one, two) == pytest.approx(np.vdot(dense(one), dense(two)), abs=1e-10)
    np.testing.assert_allclose(dense(products.difference(one, two)), dense(one) - dense(two), atol=1e-12)
    np.testing.assert_allclose(dense(products.scaled(one, -2.5)), -2.5 * dense(one), atol=1e-12)
    assert products.frobenius(one) == pytest.approx(np.linalg.norm(dense(one)), rel=1e-12)


def test_a_product_is_widened_before_it_is_computed_with() -> None:
    narrow = Factors(np.full((2, 1), 3e20, np.float32), np.full((1, 2), 3e20, np.float32))
    wide = products.widened(narrow)
    assert {wide.b.dtype, wide.a.dtype} == {np.dtype(np.float64)}
    assert products.frobenius(wide) == pytest.approx(1.8e41)
    assert narrow.b.dtype == np.float32


def test_a_difference_of_near_products_keeps_its_digits() -> None:
    one = drawn(9, 7, 3)
    near = Factors(one.b * (1 + 1e-12), one.a)
    assert products.frobenius(products.difference(near, one)) == pytest.approx(
        1e-12 * products.frobenius(one), rel=1e-3
    )


# Small ranks: QR of both factors.


@given(sizes, sizes, st.integers(1, 6), st.integers(0, 99))
def test_singular_values_are_the_dense_ones(outputs: int, inputs: int, rank: int, seed: int) -> None:
    product = drawn(outputs, inputs, rank, seed)
    found = products.singular_values(product)
    assert len(found) == min(outputs, inputs, rank)
    np.testing.assert_allclose(found, values(dense(product))[: len(found)], atol=1e-10)


@given(sizes, sizes, st.integers(1, 6), st.integers(0, 7), st.integers(0, 99))
def test_truncation_is_the_dense_one(outputs: int, inputs: int, rank: int, keep: int, seed: int) -> None:
    product = drawn(outputs, inputs, rank, seed)
    nearest, spectrum = products.truncate(product, keep)
    u, s, vt = np.linalg.svd(dense(product), full_matrices=False)
    kept = min(keep, rank, outputs, inputs)
    assert nearest.rank == kept
    np.testing.assert_allclose(dense(nearest), (u[:, :kept] * s[:kept]) @ vt[:kept], atol=1e-9)
    assert spectrum.dropped == pytest.approx(np.linalg.norm(s[kept:]), abs=1e-9)
    assert spectrum == pytest.approx(products.spectrum(product, kept), rel=1e-9, abs=1e-12)


@given(sizes, sizes, st.integers(1, 6), st.integers(0, 99))
def test_each_factor_of_a_truncation_has_a_root_of_the_singular_values(
    outputs: int, inputs: int, rank: int, seed: int
) -> None:
    product = drawn(outputs, inputs, rank, seed)
    nearest = products.truncate(product, rank).factors
    expected = np.diag(values(dense(product))[: nearest.rank])
    np.testing.assert_allclose(nearest.b.T @ nearest.b, expected, atol=1e-9)
    np.testing.assert_allclose(nearest.a @ nearest.a.T, expected, atol=1e-9)


@given(sizes, sizes, st.integers(1, 6), st.integers(0, 8), st.integers(0, 99))
def test_the_spectrum_is_the_dense_one(outputs: int, inputs: int, rank: int, keep: int, seed: int) -> None:
    product = drawn(outputs, inputs, rank, seed)
    squares = values(dense(product)) ** 2
    size, dropped, effective = products.spectrum(product, keep)
    assert size == pytest.approx(np.linalg.norm(dense(product)), rel=1e-10)
    assert dropped == pytest.approx(math.sqrt(squares[keep:].sum()), abs=1e-7)
    assert effective == pytest.approx(squares.sum() ** 2 / (squares**2).sum(), rel=1e-9)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_the_effective_rank_of_equal_singular_values_is_their_number(count: int) -> None:
    product = Factors(7.0 * np.eye(6)[:, :count], np.eye(8)[:count])
    assert products.spectrum(product, 6).effective_rank == pytest.approx(count)


def test_the_effective_rank_by_hand() -> None:
    # (4 + 1)² / (16 + 1)
    assert products.spectrum(Factors(np.diag([2.0, 1.0]), np.eye(2)), 1) == pytest.approx((math.sqrt(5), 1.0, 25 / 17))


@pytest.mark.parametrize("size", [1, 3, products.GRAM_FROM + 2])
def test_an_identity_times_an_identity(size: int) -> None:
    both = Factors(np.eye(size), np.eye(size))
    found = products.spectrum(both, 1)
    assert found == pytest.approx((math.sqrt(size), math.sqrt(size - 1), float(size)), abs=1e-6)
    nearest = products.truncate(both, size).factors
    np.testing.assert_allclose(dense(nearest), np.eye(size), atol=1e-6)


def test_a_product_of_zero_has_no_effective_rank() -> None:
    nothing = Factors(np.zeros((4, 2)), np.ones((2, 3)))
    size, dropped, effective = products.spectrum(nothing, 1)
    assert (size, dropped) == (0.0, 0.0)
    assert math.isnan(effective)
    assert dense(products.truncate(nothing, 1).factors).tolist() == np.zeros((4, 3)).tolist()


@pytest.mark.parametrize("scale", [1e-30, 1e-10, 1e20, 3e38])
def test_no_scale_that_float32_can_hold_is_beyond_the_spectrum(scale: float) -> None:
    # Both factors may be as great as float32 is: σ² is up to 1e160, and its square beyond float64.
    product = drawn(16, 16, 4)
    spread = products.spectrum(product, 2)
    scaled = products.spectrum(Factors(scale * product.b, scale * product.a), 2)
    assert scaled.size == pytest.approx(scale**2 * spread.size, rel=1e-6)
    assert scaled.dropped == pytest.approx(scale**2 * spread.dropped, rel=1e-6)
    assert scaled.effective_rank == pytest.approx(spread.effective_rank, rel=1e-6)


@given(st.integers(1, 6), st.integers(0, 99))
def test_trimming_drops_what_a_product_does_not_need(needed: int, seed: int) -> None:
    product = drawn(9, 8, needed, seed)
    mixing = np.random.default_rng(seed).standard_normal((needed, needed + 5))
    spare = Factors(product.b @ np.linalg.pinv(mixing @ mixing.T) @ mixing, mixing.T @ product.a)
    assert spare.rank == needed + 5
    trimmed = products.trimmed(spare, 1e-9)
    assert trimmed.rank == needed
    np.testing.assert_allclose(dense(trimmed), dense(product), atol=1e-7 * products.frobenius(product))


def test_trimming_leaves_what_is_needed_as_it_is() -> None:
    product = drawn(9, 8, 4)
    assert products.trimmed(product) is product
    nothing = products.trimmed(Factors(np.zeros((4, 2)), np.ones((2, 3))))
    assert (nothing.rank, nothing.shape) == (0, (4, 3))


def test_nothing_to_truncate_or_trim() -> None:
    empty = Factors(np.zeros((4, 0)), np.zeros((0, 3)))
    assert products.truncate(empty, 2).factors.rank == 0
    assert products.trimmed(empty).rank == 0
    assert products.spectrum(empty, 1)[:2] == (0.0, 0.0)


# Great ranks: Gram matrices.

GREAT = products.GRAM_FROM + 40


@pytest.fixture(scope="module")
def great() -> Factors:
    """A product of full rank `GREAT`, whose singular values spread over some digits."""
    return drawn(GREAT + 60, GREAT + 20, GREAT, seed=5, decay=0.01)


def by_gram(product: Factors) -> bool:
    """Whether Gram matrices serve this product."""
    return products._whitened(product) is not None


@pytest.fixture(scope="module")
def reference(great: Factors) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    u, s, vt = np.linalg.svd(dense(great), full_matrices=False)
    return u, s, vt


def test_great_ranks_go_through_gram_matrices(great: Factors) -> None:
    assert by_gram(great)
    below = products.GRAM_FROM - 1
    assert not by_gram(Factors(great.b[:, :below], great.a[:below]))
    assert by_gram(Factors(great.b[:, : below + 1], great.a[: below + 1]))


@pytest.mark.parametrize("keep", [1, 32, GREAT])
def test_great_truncations_are_the_dense_ones(
    great: Factors, reference: tuple[np.ndarray, np.ndarray, np.ndarray], keep: int
) -> None:
    u, s, vt = reference
    nearest, spectrum = products.truncate(great, keep)
    assert nearest.rank == keep
    best = (u[:, :keep] * s[:keep]) @ vt[:keep]
    assert np.linalg.norm(dense(nearest) - best) <= 1e-6 * np.linalg.norm(s)
    assert spectrum.size == pytest.approx(np.linalg.norm(s), rel=1e-10)
    assert spectrum.dropped == pytest.approx(np.linalg.norm(s[keep:]), rel=1e-6, abs=1e-6 * s[0])
    assert spectrum.effective_rank == pytest.approx((s**2).sum() ** 2 / (s**4).sum(), rel=1e-8)
    np.testing.assert_allclose(np.diagonal(nearest.b.T @ nearest.b), s[:keep], rtol=1e-6, atol=1e-6 * s[0])
    np.testing.assert_allclose(np.diagonal(nearest.a @ nearest.a.T), s[:keep], rtol=1e-6, atol=1e-6 * s[0])


def test_great_spectra_are_the_dense_ones(great: Factors, reference: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    s = reference[1]
    np.testing.assert_allclose(products.singular_values(great), s[:GREAT], atol=1e-7 * s[0])
    found = products.spectrum(great, 100)
    squares = s**2
    expected = (np.linalg.norm(s), np.linalg.norm(s[100:]), squares.sum() ** 2 / (squares**2).sum())
    assert found == pytest.approx(expected, rel=1e-7)


def test_a_matrix_times_the_identity_is_truncated_as_it_is() -> None:
    size = products.GRAM_FROM + 8
    matrix = dense(drawn(60, size, 40, decay=0.2))
    product = Factors(matrix, np.eye(size))
    assert by_gram(product)
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    for found, best in (
        (product, (u[:, :5] * s[:5]) @ vt[:5]),
        (Factors(np.eye(size), matrix.T), ((u[:, :5] * s[:5]) @ vt[:5]).T),
    ):
        nearest, spectrum = products.truncate(found, 5)
        np.testing.assert_allclose(dense(nearest), best, atol=1e-7 * s[0])
        assert spectrum.dropped == pytest.approx(np.linalg.norm(s[5:]), rel=1e-6)
        np.testing.assert_allclose(products.singular_values(found)[:40], s[:40], atol=1e-6 * s[0])
    nearest = products.truncate(product, 5).factors
    near = np.eye(size)
    near[0, 1] = 1e-3
    other = products.truncate(Factors(matrix, near), 5).factors
    assert np.linalg.norm(dense(other) - dense(nearest)) > 1e-4


@pytest.mark.parametrize("dependent", [1.0, 1.0 + 1e-9])
def test_rows_that_are_nearly_dependent_go_through_qr(dependent: float) -> None:
    product = drawn(60, GREAT + 10, GREAT, decay=0.01)
    a = product.a.copy()
    a[1] = dependent * a[0] + (0 if dependent == 1.0 else 1e-9 * a[2])
    singular = Factors(product.b, a)
    assert not by_gram(singular)
    nearest, spectrum = products.truncate(singular, 7)
    u, s, vt = np.linalg.svd(dense(singular), full_matrices=False)
    np.testing.assert_allclose(dense(nearest), (u[:, :7] * s[:7]) @ vt[:7], atol=1e-9 * s[0])
    assert spectrum.dropped == pytest.approx(np.linalg.norm(s[7:]), rel=1e-9)


def test_a_rank_above_a_side_of_the_weight_is_no_more_than_the_side() -> None:
    tall = drawn(40, 30, products.GRAM_FROM + 3)
    assert not by_gram(tall)
    nearest = products.truncate(tall, 600).factors
    assert nearest.rank == 30
    np.testing.assert_allclose(dense(nearest), dense(tall), atol=1e-9 * products.frobenius(tall))
    flat = drawn(30, GREAT + 50, GREAT)
    assert by_gram(flat)
    assert products.truncate(flat, 600).factors.rank == 30
    assert len(products.singular_values(flat)) == 30


@pytest.mark.parametrize("spare", ["zeros", "repeats"])
def test_great_products_of_lower_rank_are_trimmed_to_it(spare: str) -> None:
    b, a = drawn(60, 1, 12).b, drawn(1, GREAT + 10, GREAT, 3).a
    more = np.zeros((60, GREAT - 12)) if spare == "zeros" else np.resize(b.T, (GREAT - 12, 60)).T
    product = Factors(np.hstack([b, more]), a)
    assert by_gram(product)
    trimmed = products.trimmed(product)
    assert trimmed.rank == 12
    np.testing.assert_allclose(dense(trimmed), dense(product), atol=1e-6 * products.frobenius(product))


def test_a_great_product_of_zero() -> None:
    nothing = Factors(np.zeros((30, GREAT)), drawn(1, GREAT + 20, GREAT).a)
    assert by_gram(nothing)
    for keep in (0, 3):
        nearest, spectrum = products.truncate(nothing, keep)
        assert nearest.rank == keep
        assert not np.any(dense(nearest))
        assert spectrum[:2] == (0.0, 0.0)
    assert products.trimmed(nothing).rank == 0


def test_inputs_are_not_changed(great: Factors) -> None:
    copies = [(product, product.b.copy(), product.a.copy()) for product in (drawn(6, 5, 3), great)]
    for product, b, a in copies:
        for keep in (2, product.rank):
            products.truncate(product, keep)
        products.spectrum(product, 2)
        products.scaled(product, 3.0)
        assert np.array_equal(product.b, b)
        assert np.array_equal(product.a, a)
