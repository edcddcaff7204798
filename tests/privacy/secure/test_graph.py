from __future__ import annotations

import math
from collections import Counter
from itertools import combinations

import numpy as np
import pytest
from scipy import stats

from fedpeft.privacy.secure import graph
from fedpeft.privacy.secure.graph import MOST_COMPLETE, chosen, exposure_bits, failure_bits, holders, least_degree


def test_every_set_of_neighbours_is_as_likely_as_any_other() -> None:
    entropy = np.random.default_rng(0).bytes
    found = Counter(chosen([3, 5, 8, 9, 11], 2, entropy) for _ in range(10_000))
    assert set(found) == set(combinations([3, 5, 8, 9, 11], 2))
    assert stats.chisquare(list(found.values())).pvalue > 1e-4


def test_all_others_are_neighbours_where_no_more_are_asked_for() -> None:
    assert chosen([4, 2, 9], 3, np.random.default_rng(0).bytes) == (2, 4, 9)
    assert holders(4, 3) == holders(4, 30) == 4
    assert holders(40, 3) == 4


def test_a_complete_graph_is_certain_one_way_or_the_other() -> None:
    # Two answers of t each need 2 t holders, of whom the colluding give both: 2 t > n + m.
    assert exposure_bits(10, 9, 6, 0) == math.inf
    assert exposure_bits(10, 9, 5, 0) == 0.0
    assert exposure_bits(10, 9, 7, 3) == math.inf
    assert exposure_bits(10, 9, 6, 2) == 0.0
    assert failure_bits(10, 9, 6, 4) == math.inf
    assert failure_bits(10, 9, 6, 5) == 0.0


@pytest.mark.parametrize(("population", "marked", "draws", "least"), [(99, 20, 15, 6), (50, 50, 7, 7), (30, 3, 20, 4)])
def test_tails_are_those_of_the_hypergeometric_law(population: int, marked: int, draws: int, least: int) -> None:
    found = graph._log_tail(population, np.array([marked]), draws, least)[0]
    expected = stats.hypergeom(population, marked, draws).sf(least - 1)
    assert math.exp(found) == pytest.approx(expected, rel=1e-9, abs=1e-300)


def test_tails_in_parts_are_the_tails(monkeypatch: pytest.MonkeyPatch) -> None:
    marked = np.arange(3, 60)
    whole = graph._log_tail(99, marked, 15, 6)
    monkeypatch.setattr(graph, "_MOST_CELLS", 40)
    assert (graph._log_tail(99, marked, 15, 6) == whole).all()


def test_a_sum_fails_no_more_often_than_the_bound_says() -> None:
    clients, degree, threshold, dropped, draw = 60, 12, 7, 9, np.random.default_rng(0)
    failed = 0
    for _ in range(1500):
        chosen_ = draw.permuted(np.tile(np.arange(clients - 1), (clients, 1)), axis=1)[:, :degree]
        others = chosen_ + (chosen_ >= np.arange(clients)[:, None])
        gone = (others < dropped).sum(axis=1)
        # One that dropped is no holder of its own secret any more.
        left = degree + 1 - gone - (np.arange(clients) < dropped)
        failed += bool((left < threshold).any())
    bound = 2 ** -failure_bits(clients, degree, threshold, dropped)
    assert 0 < failed / 1500 <= bound
    assert bound < 1


def closed_sets(clients: int, degree: int, threshold: int, draw: np.random.Generator) -> bool:
    """Whether some set of at most half of the clients could be opened apart, by trying all."""
    masks = []
    for one in range(clients):
        others = draw.permutation([other for other in range(clients) if other != one])[:degree]
        masks.append(sum(1 << int(other) for other in others))
    for number in range(1, 1 << clients):
        if number.bit_count() <= clients // 2 and all(
            (masks[one] & number).bit_count() >= threshold - 1 for one in range(clients) if number >> one & 1
        ):
            return True
    return False


def test_small_sums_open_apart_no_more_often_than_the_bound_says() -> None:
    clients, degree, threshold, draw = 10, 4, 4, np.random.default_rng(0)
    opened = sum(closed_sets(clients, degree, threshold, draw) for _ in range(400)) / 400
    bound = 2 ** -exposure_bits(clients, degree, threshold, 0)
    assert 0 < opened <= bound + 4 * math.sqrt(bound / 400)
    assert bound < 1


def test_more_collusion_less_threshold_or_fewer_neighbours_expose_more() -> None:
    bits = exposure_bits(500, 80, 58, 20)
    assert bits > 40
    assert exposure_bits(500, 80, 58, 40) < bits
    assert exposure_bits(500, 80, 54, 20) < bits
    assert exposure_bits(500, 60, 43, 20) < bits


def test_many_colluding_holders_are_counted_even_where_no_set_is_small() -> None:
    # Of (a) alone: 2 t − h colluding among those that a client chose.
    clients, degree, threshold, colluding = 200, 100, 52, 20
    both = (clients - colluding) * stats.hypergeom(clients - 1, colluding, degree).sf(2 * threshold - degree - 2)
    assert 2 ** -exposure_bits(clients, degree, threshold, colluding) >= min(both, 1.0) * (1 - 1e-9)


@pytest.mark.parametrize(("dropout", "colluding"), [(0.05, 0.0), (0.1, 0.05)])
def test_the_planned_degree_is_safe_opens_and_grows_like_the_logarithm(dropout: float, colluding: float) -> None:
    degrees = []
    for clients in (300, 1200, 4800):
        dropped, league = round(dropout * clients), round(colluding * clients)
        degree, threshold = least_degree(clients, dropped, league, 40.0, 20.0)
        assert exposure_bits(clients, degree, threshold, league) >= 40
        assert failure_bits(clients, degree, threshold, dropped) >= 20
        degrees.append(degree)
    assert degrees[0] < 200
    # Sixteen times the clients, and less than twice the neighbours.
    assert degrees[2] < 2 * degrees[0]


def test_a_small_cohort_masks_all_with_all() -> None:
    assert least_degree(MOST_COMPLETE, 3, 0, 40.0, 20.0) == (MOST_COMPLETE - 1, MOST_COMPLETE // 2 + 1)
    assert least_degree(10, 3, 3, 40.0, 20.0) == (9, 7)


def test_a_cohort_too_small_for_fewer_neighbours_masks_all_with_all() -> None:
    clients = MOST_COMPLETE + 6
    assert least_degree(clients, 25, 20, 40.0, 20.0) == (clients - 1, (clients + 20) // 2 + 1)
