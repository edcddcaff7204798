"""Who is drawn: each sampler by the law that its account rests on."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binom, chisquare

from fedpeft.privacy import SAMPLERS, SOURCES, Population
from fedpeft.privacy.entropy import normal_like, normals

MANY = 4000


def draws(name: str, population: Population, source: str = "seed") -> list[tuple[int, ...]]:
    draw = SAMPLERS[name].draw
    assert draw is not None
    return [draw(population, round_, SOURCES[source](3, round_, "cohort")) for round_ in range(1, MANY + 1)]


def test_coins_give_binomial_numbers_of_clients_and_each_its_rate() -> None:
    found = draws("poisson", Population(20, 5))
    sizes = np.bincount([len(drawn) for drawn in found], minlength=21)
    expected = MANY * binom.pmf(np.arange(21), 20, 0.25)
    kept = expected > 5
    tail = [sizes[~kept].sum(), expected[~kept].sum()]
    assert chisquare([*sizes[kept], tail[0]], [*expected[kept], tail[1]]).pvalue > 1e-4
    shares = np.bincount(np.concatenate(found).astype(int), minlength=20) / MANY
    assert np.abs(shares - 0.25).max() < 5 * np.sqrt(0.25 * 0.75 / MANY)


def test_a_fixed_number_is_drawn_without_repeats_and_nobody_more_often() -> None:
    found = draws("fixed", Population(20, 5))
    assert {len(set(drawn)) for drawn in found} == {5}
    shares = np.bincount(np.concatenate(found), minlength=20) / MANY
    assert np.abs(shares - 0.25).max() < 5 * np.sqrt(0.25 * 0.75 / MANY)


def test_groups_take_turns_so_that_nobody_is_in_two_rounds_closer_than_there_are_groups() -> None:
    found = draws("poisson", Population(12, 3, groups=4))
    last: dict[int, int] = {}
    for round_, drawn in enumerate(found):
        for partition in drawn:
            assert round_ - last.get(partition, -4) >= 4
            last[partition] = round_
    assert len(last) == 12


def test_the_rate_is_that_of_the_smallest_group() -> None:
    assert Population(20, 5).rate == 0.25
    assert Population(10, 2, groups=3).rate == pytest.approx(2 / 3)
    assert Population(4, 4, groups=4).rate == 1.0


def test_everyone_is_everyone_and_the_reachable_are_left_to_the_run() -> None:
    assert draws("everyone", Population(4, 2))[0] == (0, 1, 2, 3)
    assert SAMPLERS["reachable"].draw is SAMPLERS["own"].draw is None


def test_a_seed_repeats_and_the_system_never_does() -> None:
    assert draws("poisson", Population(20, 5)) == draws("poisson", Population(20, 5))
    one, two = (SOURCES["os"](3, 1, "noise")(1000) for _ in range(2))
    assert not np.array_equal(one, two)


@pytest.mark.parametrize("source", ["os", "seed"])
def test_the_noise_is_normal(source: str) -> None:
    drawn = normals(SOURCES[source](1, "noise"), 200_001)
    assert drawn.shape == (200_001,)
    edges = np.array([-3, -2, -1, -0.5, 0, 0.5, 1, 2, 3.0])
    from scipy.stats import norm

    expected = np.diff([0, *norm.cdf(edges), 1]) * len(drawn)
    counts = np.histogram(drawn, [-np.inf, *edges, np.inf])[0]
    assert chisquare(counts, expected).pvalue > 1e-4
    assert abs(np.corrcoef(drawn[:100_000], drawn[100_001:])[0, 1]) < 0.02


def test_tensors_share_one_stream_in_order_of_name() -> None:
    shapes = {"b": (2, 3), "a": (4,), "c": ()}
    found = normal_like(SOURCES["seed"](1, "noise"), shapes)
    whole = normals(SOURCES["seed"](1, "noise"), 11)
    assert {key: value.shape for key, value in found.items()} == shapes
    np.testing.assert_array_equal(np.concatenate([found[key].ravel() for key in "abc"]), whole)
