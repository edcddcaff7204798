from __future__ import annotations

import math
import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.errors import AdapterError, ConfigError
from fedpeft.privacy.secure.fixed_point import (
    Grid,
    nearest,
    quantised,
    quantised_within,
    real,
    rounded_norm,
    rounded_norm_1,
)

GRID = Grid(clip=1.0, bits=3)
# The levels of three bits are −3 … 3, a third apart.


def seeded(seed: int = 0):  # type: ignore[no-untyped-def]
    return np.random.default_rng(seed).bytes


def test_the_grid_holds_its_ends_and_zero() -> None:
    assert GRID.levels == 3
    assert GRID.step == pytest.approx(1 / 3)
    values = np.array([-1.0, -1 / 3, 0.0, 2 / 3, 1.0])
    assert nearest(values, GRID).tolist() == [-3, -1, 0, 2, 3]
    assert quantised(np.array([-1.0, 0.0, 1.0]), GRID, seeded()).tolist() == [-3, 0, 3]
    assert real(nearest(values, GRID), GRID) == pytest.approx(values)


@given(st.lists(st.floats(-0.05, 0.05, allow_subnormal=False), min_size=1, max_size=50), st.integers(2, 32))
def test_rounding_is_off_by_less_than_a_step(numbers: list[float], bits: int) -> None:
    grid, values = Grid(0.05, bits), np.array(numbers)
    for rounded, most in ((quantised(values, grid, seeded()), 1.0), (nearest(values, grid), 0.5)):
        assert rounded.dtype == np.int64
        assert int(np.abs(rounded).max()) <= grid.levels
        assert float(np.abs(real(rounded, grid) - values).max()) <= most * grid.step * (1 + 1e-6) + 1e-15


def test_random_rounding_has_the_mean_and_at_most_the_variance_that_are_stated() -> None:
    count = 200_000
    for value in (-0.9, -0.1, 0.05, 0.5, 2 / 3):
        found = real(quantised(np.full(count, value), GRID, seeded()), GRID)
        assert abs(found.mean() - value) < 5 * GRID.step / 2 / math.sqrt(count)
        assert found.var() <= GRID.step**2 / 4 * 1.02


def test_sixteen_bits_over_a_clip_of_a_twentieth_keep_values_of_a_thousandth() -> None:
    # Ten clients: 10 · 32767 levels either way are 655,340 integers, which 20 bits hold.
    draw, grid = np.random.default_rng(0), Grid(0.05, 16)
    values = [draw.normal(0, 1e-3, 10_000) for _ in range(10)]
    total = real(sum(quantised(one, grid, seeded(at)) for at, one in enumerate(values)), grid)  # type: ignore[arg-type]
    assert np.linalg.norm(total - sum(values)) / np.linalg.norm(sum(values)) < 1e-3
    assert grid.width(10) == 20


@given(st.integers(2, 1000), st.integers(2, 32))
def test_a_sum_fits_its_width_and_never_takes_more_than_stated(clients: int, bits: int) -> None:
    grid = Grid(1.0, bits)
    width = grid.width(clients)
    assert clients * grid.levels <= 2 ** (width - 1) - 1 or 2 * clients * grid.levels < 2**width
    assert width <= math.ceil(math.log2(clients * 2**bits))


@pytest.mark.parametrize("value", [1.0001, -1.0001, math.nan, math.inf, -math.inf])
def test_values_beyond_the_clip_are_refused(value: float) -> None:
    for rounding in (nearest, quantised):
        with pytest.raises(AdapterError, match=r"expected numbers from -1 to 1, found a magnitude of"):
            rounding(np.array([0.0, value]), GRID)


@pytest.mark.parametrize(("clip", "bits"), [(0.0, 8), (-1.0, 8), (math.nan, 8), (math.inf, 8), (1.0, 1), (1.0, 33)])
def test_a_grid_without_a_range_is_refused(clip: float, bits: int) -> None:
    with pytest.raises(ConfigError, match="expected a positive clip and from 2 to 32 bits"):
        Grid(clip, bits)


def test_the_norm_after_rounding_is_bounded_as_in_the_paper() -> None:
    # ‖x‖ = 10, d = 16: always ≤ 14; β = e^(−1/2): √(100 + 4 + 1 · (10 + 2)) = √116.
    assert rounded_norm(10.0, 16, 0.0) == 14.0
    assert rounded_norm(10.0, 16, math.exp(-0.5)) == pytest.approx(math.sqrt(116))
    assert rounded_norm_1(3.0, 4) == 6.0
    assert rounded_norm_1(3.0, 100) == 9.0


def test_the_bound_holds_as_often_as_it_says() -> None:
    draw, tries, size, beta = np.random.default_rng(0), 2000, 40, 0.3
    grid = Grid(1.0, 5)
    values = draw.normal(size=size)
    values /= np.linalg.norm(values)
    most = rounded_norm(1.0 / grid.step, size, beta)
    norms = [np.linalg.norm(quantised(values, grid, draw.bytes).astype(float)) for _ in range(tries)]
    assert np.mean(np.array(norms) > most) <= beta
    assert max(norms) <= rounded_norm(1.0 / grid.step, size, 0.0)


def test_conditional_rounding_is_never_longer_than_its_bound() -> None:
    draw, grid, size, beta = np.random.default_rng(0), Grid(1.0, 5), 40, 0.97
    values = np.abs(draw.normal(size=size))
    values /= np.linalg.norm(values)
    most = rounded_norm(1.0 / grid.step, size, beta)
    free = [np.linalg.norm(quantised(values, grid, draw.bytes).astype(float)) for _ in range(300)]
    kept = [np.linalg.norm(quantised_within(values, grid, 1.0, beta, draw.bytes).astype(float)) for _ in range(300)]
    assert max(free) > most >= max(kept)


def test_a_vector_that_is_longer_than_its_norm_is_refused() -> None:
    with pytest.raises(AdapterError, match=r"expected numbers of norm at most 1, found 1\.4"):
        quantised_within(np.ones(2), GRID, 1.0, 0.1, os.urandom)
