"""Algebra of products B A in factored form; nothing of shape (out, in) is formed while the rank is below both.

Small ranks go through thin QR of both factors, which loses no digit. Great ones go through the Gram matrices
of the factors, several times faster: singular values far below the greatest lose half of their digits (float64),
which is out of sight in float32.

Source: the SVD of a product from QR of its factors is Golub and Van Loan, "Matrix Computations", section 8.6.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import scipy.linalg
from scipy.linalg import blas

from fedpeft.adapters import Factors

GRAM_FROM = 512
"""The rank from which Gram matrices replace QR."""

_ROWS = 512
"""How many rows of a product are formed at a time."""

_GRAM_NOISE = 1e-7
"""Singular values from Gram matrices are not known below this, over the greatest (the root of float64's precision)."""

_LEAST_PIVOT = 1e-5
"""The least pivot of a Cholesky factor, over the greatest, with which singular values keep six digits."""


class Spectrum(NamedTuple):
    """What the singular values σ of a product come to.

    `size` is ‖·‖_F; `dropped` the norm of what the best approximation at some rank leaves out; `effective_rank`
    is (Σ σ²)² / Σ σ⁴: n for n equal singular values, 1 for a single one, NaN for a product of zero.

    Source: the participation ratio, Gao et al. 2017, "A theory of multineuronal dimensionality", eq. 5.
    """

    size: float
    dropped: float
    effective_rank: float


class Truncated(NamedTuple):
    """The best approximation of a product at some rank, √S in each factor, and the spectrum of the product."""

    factors: Factors
    spectrum: Spectrum


def stack(products: Sequence[Factors]) -> Factors:
    """Factors of the sum of products; ranks add up."""
    return Factors(
        np.concatenate([one.b for one in products], axis=-1), np.concatenate([one.a for one in products], axis=-2)
    )


def scaled(product: Factors, by: float) -> Factors:
    """The product times a number."""
    return Factors(by * product.b, product.a)


def frobenius(product: Factors) -> float:
    """‖B A‖_F, from the triangular factors, or, where the rank is great, from a few rows at a time, which is less."""
    if 2 * product.rank > min(product.shape):
        rows = range(0, product.shape[0], _ROWS)
        return math.hypot(*(float(np.linalg.norm(product.b[start : start + _ROWS] @ product.a)) for start in rows))
    left, right = _triangles(product)
    return float(np.linalg.norm(left @ right.T))


def inner(one: Factors, other: Factors) -> float:
    """⟨B₁A₁, B₂A₂⟩ = ⟨B₁ᵀB₂, A₁A₂ᵀ⟩."""
    return float(np.vdot(one.b.T @ other.b, one.a @ other.a.T))


def widened(product: Factors) -> Factors:
    """The product in float64."""
    return Factors(product.b.astype(np.float64), product.a.astype(np.float64))


def difference(one: Factors, other: Factors) -> Factors:
    """Factors of one product less another."""
    return stack([one, scaled(other, -1.0)])


def singular_values(product: Factors) -> np.ndarray:
    """The singular values, greatest first; as many as the rank or the smaller side."""
    if _stands_left(product):
        return singular_values(_transposed(product))
    if whitened := _whitened(product):
        squares = scipy.linalg.eigvalsh(whitened.middle, overwrite_a=True, check_finite=False)
        return np.asarray(np.sqrt(np.maximum(squares[::-1], 0.0)))[: min(product.shape)]
    left, right = _triangles(product)
    return np.asarray(np.linalg.svd(left @ right.T, compute_uv=False))


def spectrum(product: Factors, rank: int) -> Spectrum:
    """The spectrum of the product, with what an approximation at `rank` leaves out."""
    return _spectrum(singular_values(product) ** 2, rank)


def truncate(product: Factors, rank: int) -> Truncated:
    """The product at rank `rank` or less, nearest in the Frobenius norm; its singular vectors have settled signs.

    Source: Eckart and Young 1936.
    """
    if _stands_left(product):
        nearest = truncate(_transposed(product), rank)
        return nearest._replace(factors=_transposed(nearest.factors))
    keep = min(rank, product.rank, *product.shape)
    if keep == 0:
        return Truncated(Factors(product.b[:, :0], product.a[:0]), spectrum(product, 0))
    whitened = _whitened(product)
    nearest = _by_gram(product, whitened, keep) if whitened else _by_qr(product, keep)
    return nearest._replace(factors=_signed(nearest.factors))


def trimmed(product: Factors, tolerance: float = 1e-12) -> Factors:
    """The product at the rank that it needs: singular values below `tolerance` times the greatest are dropped.

    From Gram matrices none below about 1e-7 can be told from rounding, so those are dropped there.
    """
    values, least = singular_values(product), tolerance if product.rank < GRAM_FROM else max(tolerance, _GRAM_NOISE)
    needed = int(np.count_nonzero(values > least * max(values[0], 0.0))) if values.size else 0
    return product if needed == product.rank else truncate(product, needed).factors


def _signed(product: Factors) -> Factors:
    """The same product with the greatest number of each column of B above 0, so that no sign is left to chance."""
    if not product.rank:
        return product
    greatest = product.b[np.argmax(np.abs(product.b), axis=0), np.arange(product.rank)]
    signs = np.where(greatest < 0, -1.0, 1.0)
    return Factors(product.b * signs, signs[:, None] * product.a)


def _by_qr(product: Factors, keep: int) -> Truncated:
    q_left, left = np.linalg.qr(product.b)
    q_right, right = np.linalg.qr(product.a.T)
    u, values, vt = np.linalg.svd(left @ right.T, full_matrices=False)
    root = np.sqrt(values[:keep])
    factors = Factors((q_left @ u[:, :keep]) * root, root[:, None] * (vt[:keep] @ q_right.T))
    return Truncated(factors, _spectrum(values**2, keep))


def _spectrum(squares: np.ndarray, rank: int) -> Spectrum:
    """From σ², greatest first."""
    total = float(squares.sum())
    shares = squares / total if total > 0 else squares
    return Spectrum(
        float(np.sqrt(total)), float(np.sqrt(squares[rank:].sum())), _effective_rank(float(shares @ shares))
    )


def _effective_rank(fourths: float) -> float:
    """From Σ σ⁴ / (Σ σ²)²."""
    return 1.0 / fourths if fourths > 0 else float("nan")


class _Whitened(NamedTuple):
    """L with L Lᵀ = A Aᵀ (None where A is an identity), and Lᵀ BᵀB L, whose eigenvalues are those of TᵀT."""

    lower: np.ndarray | None
    middle: np.ndarray


def _whitened(product: Factors) -> _Whitened | None:
    """None where the rank is small, or the rows of A are too near to dependent for a Gram matrix of them.

    A rank² matrix can be as great as all that clients sent, so each is overwritten by what comes of it.
    """
    if product.rank < GRAM_FROM:
        return None
    if _is_identity(product.a):
        return _Whitened(None, _gram(product.b.T))
    try:
        lower = scipy.linalg.cholesky(_gram(product.a), lower=True, overwrite_a=True, check_finite=False)
    except np.linalg.LinAlgError:
        return None
    pivots = np.diagonal(lower)
    if pivots.min() < _LEAST_PIVOT * pivots.max():
        return None
    half = blas.dtrmm(1.0, lower, _gram(product.b.T), side=1, lower=1, overwrite_b=1)
    return _Whitened(lower, blas.dtrmm(1.0, lower, half, trans_a=1, lower=1, overwrite_b=1))


def _gram(a: np.ndarray) -> np.ndarray:
    """A Aᵀ; the transpose, which is equal, is in the order that LAPACK overwrites."""
    gram: np.ndarray = a @ a.T
    return gram.T


def _by_gram(product: Factors, whitened: _Whitened, keep: int) -> Truncated:
    """T = (B L)(L⁻¹ A), whose second factor is orthonormal: T's singular values and left vectors are those of B L."""
    lower, middle = whitened
    total, length, size = float(np.trace(middle)), float(np.linalg.norm(middle)), middle.shape[0]
    squares, v = scipy.linalg.eigh(
        middle, subset_by_index=(size - keep, size - 1), driver="evr", overwrite_a=True, check_finite=False
    )
    squares, v = np.maximum(squares[::-1], 0.0), v[:, ::-1]
    root = squares**0.25
    over = np.divide(1.0, root, out=np.zeros_like(root), where=root > 0)
    if lower is None:
        left, right = v, v.T
    else:
        left = lower @ v
        right = scipy.linalg.solve_triangular(lower, v, lower=True, trans="T", check_finite=False).T @ product.a
    factors = Factors((product.b @ left) * over, root[:, None] * right)
    dropped = max(0.0, total - float(squares.sum()))
    effective = _effective_rank((length / total) ** 2 if total > 0 else 0.0)
    return Truncated(factors, Spectrum(float(np.sqrt(max(0.0, total))), float(np.sqrt(dropped)), effective))


def _stands_left(product: Factors) -> bool:
    """Whether B is a great identity and A is not, so that the Gram matrix of Aᵀ is all that is needed."""
    return product.rank >= GRAM_FROM and _is_identity(product.b) and not _is_identity(product.a)


def _is_identity(a: np.ndarray) -> bool:
    return a.shape[0] == a.shape[1] and np.count_nonzero(a) == a.shape[0] and bool(np.all(np.diagonal(a) == 1.0))


def _transposed(product: Factors) -> Factors:
    return Factors(product.a.T, product.b.T)


def _triangles(product: Factors) -> tuple[np.ndarray, np.ndarray]:
    left, right = (np.linalg.qr(factor, mode="r") for factor in (product.b, product.a.T))
    return np.asarray(left), np.asarray(right)
