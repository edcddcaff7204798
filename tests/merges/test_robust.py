"""Robust rules against goldens by hand, plain references over vectors, their laws, and attacks."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.errors import FederationError, QuorumError
from fedpeft.merges.robust import (
    Coordinate,
    Judge,
    Verdict,
    bulyan_mean,
    bulyan_selection,
    coordinate_median,
    geometric_median,
    krum,
    multi_krum,
    norm_bound,
    squared_distances,
    trimmed_mean,
)
from fedpeft.randomness import rng

JUDGES: dict[str, Callable[[int], Judge]] = {
    "krum": krum,
    "multi_krum": multi_krum,
    "bulyan_selection": bulyan_selection,
    "geometric_median": lambda byzantine: geometric_median(),
    "norm_bound": lambda byzantine: norm_bound(),
}
COORDINATES: dict[str, Callable[[int], Coordinate]] = {
    "coordinate_median": lambda byzantine: coordinate_median(),
    "trimmed_mean": trimmed_mean,
    "bulyan_mean": bulyan_mean,
}
COMBINES: dict[str, Callable[[int], Callable[[np.ndarray], np.ndarray]]] = {}
"""Every rule as one function of updates `(K, n)`, for f attackers."""


def judged(judge: Judge, updates: np.ndarray, weights: np.ndarray | None = None) -> Verdict:
    return judge.judge(updates @ updates.T, np.ones(len(updates)) if weights is None else weights)


def line(*values: float) -> np.ndarray:
    """Updates of one number each."""
    return np.array(values)[:, None]


def cloud(seed: int, clients: int, size: int = 6) -> np.ndarray:
    return rng(seed, "cloud").standard_normal((clients, size))


def combine_of(factory: Callable[[int], Judge]) -> Callable[[int], Callable[[np.ndarray], np.ndarray]]:
    return lambda byzantine: lambda updates: judged(factory(byzantine), updates).shares @ updates


def bulyan(byzantine: int) -> Callable[[np.ndarray], np.ndarray]:
    def combine(updates: np.ndarray) -> np.ndarray:
        selected = judged(bulyan_selection(byzantine), updates).weights > 0
        return bulyan_mean(byzantine).combine(updates[selected])

    return combine


for _name in ("krum", "multi_krum", "geometric_median", "norm_bound"):
    COMBINES[_name] = combine_of(JUDGES[_name])
COMBINES["bulyan"] = bulyan
COMBINES["coordinate_median"] = lambda byzantine: coordinate_median().combine
COMBINES["trimmed_mean"] = lambda byzantine: trimmed_mean(byzantine).combine

HOLDING = sorted(COMBINES.keys() - {"norm_bound"})
"""The rules that keep to the honest updates; a norm bound limits the pull of the others, no more."""


# Goldens by hand.


def test_krum_takes_the_update_whose_nearest_are_nearest() -> None:
    # Sums of the squares to the two nearest: 1 + 9, 1 + 4, 4 + 9, 49 + 81, 400 + 441.
    verdict = judged(krum(1), line(0, 1, 3, 10, -20))
    np.testing.assert_array_equal(verdict.weights, [0, 1, 0, 0, 0])
    np.testing.assert_array_equal(verdict.scales, np.ones(5))


def test_multi_krum_weighs_what_it_keeps() -> None:
    updates, weights = line(0, 1, 3, 10, -20), np.array([1.0, 3, 4, 100, 100])
    np.testing.assert_allclose(judged(multi_krum(1, 2), updates, weights).weights, [1 / 4, 3 / 4, 0, 0, 0])
    np.testing.assert_allclose(judged(multi_krum(1, 3), updates, weights).weights, [1 / 8, 3 / 8, 4 / 8, 0, 0])
    np.testing.assert_allclose(
        judged(multi_krum(1), updates, weights).weights, [1 / 108, 3 / 108, 4 / 108, 100 / 108, 0]
    )


def test_bulyan_selects_and_then_averages_what_is_near_the_median() -> None:
    # Chosen in the order 3, 6, 1, 0, 10; of these 3, 1 and (first of two at distance 3) 0 are nearest the median 3.
    updates = line(0, 1, 3, 6, 10, 100, -50)
    np.testing.assert_allclose(judged(bulyan_selection(1), updates).weights, [0.2] * 5 + [0, 0])
    np.testing.assert_allclose(bulyan(1)(updates), [4 / 3])


def test_bulyan_is_not_taken_in_by_the_last_attackers_who_agree_with_each_other() -> None:
    updates = np.vstack([cloud(0, 9), np.full((2, 6), 50.0)])
    weights = judged(bulyan_selection(2), updates).weights
    np.testing.assert_array_equal(weights[9:], [0, 0])
    assert np.count_nonzero(weights) == 7


@pytest.mark.parametrize(
    ("updates", "weights", "expected"),
    [
        ([[0, 0], [6, 0], [6, 3], [0, 6]], [1, 1, 1, 1], [4, 2]),  # where the diagonals y = x / 2 and y = 6 - x cross
        ([[0, 0], [4, 0], [2, 1]], [1, 1, 1], [2, 1]),  # an angle of more than 120 degrees: its corner
        ([[0, 0], [1, 0], [0.5, np.sqrt(0.75)]], [1, 1, 1], [0.5, np.sqrt(1 / 12)]),  # equal sides: the centre
        ([[0, 0], [1, 5]], [3, 7], [1, 5]),  # over half of the weight in one place
        ([[0, 0], [1, 0], [10, 0]], [1, 1, 1], [1, 0]),  # on a line: the median
        ([[0, 0], [1, 0], [10, 0]], [1, 1, 3], [10, 0]),  # and the weighted one
        ([[0, 0], [1, 0], [3, 0], [10, 0], [1e20, 0]], [1, 1, 1, 1, 1], [3, 0]),  # however far the last of them
    ],
)
def test_the_geometric_median_by_hand(updates: list[list[float]], weights: list[int], expected: list[float]) -> None:
    points = np.array(updates, float)
    found = judged(geometric_median(), points, np.array(weights, float)).shares @ points
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_smoothing_above_all_distances_gives_the_mean() -> None:
    weights = np.array([1.0, 2, 3, 4])
    np.testing.assert_allclose(judged(geometric_median(smoothing=1e3), cloud(0, 4), weights).weights, weights / 10)


def test_one_smoothed_step_by_hand() -> None:
    # Norms 1, 2, 9 have the median 2, so smoothing 1.5 is the length 3. From 1 and 2, nearest to the middle one, the
    # first point is 1.5: distances 0.5, 0.5, 7.5 pull with 1/3, 1/3, 1/7.5, that is 5 : 5 : 2.
    verdict = judged(geometric_median(iterations=1, smoothing=1.5), line(1, 2, 9))
    np.testing.assert_allclose(verdict.weights, [5 / 12, 5 / 12, 2 / 12])


def test_norms_are_cut_to_the_bound_or_to_the_median_norm() -> None:
    updates = np.array([[3.0, 4], [0, 1], [0, 10], [0, 0]])
    np.testing.assert_allclose(judged(norm_bound(4.0), updates).scales, [0.8, 1, 0.4, 1])
    np.testing.assert_allclose(judged(norm_bound(), updates).scales, [0.6, 1, 0.3, 1])  # the median of 0, 1, 5, 10
    weighted = judged(norm_bound(4.0), updates, np.array([1.0, 1, 2, 4]))
    np.testing.assert_allclose(weighted.weights, [1 / 8, 1 / 8, 1 / 4, 1 / 2])
    np.testing.assert_allclose(weighted.shares, [0.1, 1 / 8, 0.1, 1 / 2])


def test_coordinate_rules_by_hand() -> None:
    values = np.array([[[1.0, 5]], [[2, -90]], [[4, 6]], [[9, 7]], [[80, 9]]], dtype=np.float32)
    np.testing.assert_allclose(coordinate_median().combine(values), [[4, 6]])
    np.testing.assert_allclose(coordinate_median().combine(values[:4]), [[3, 5.5]])
    np.testing.assert_allclose(trimmed_mean(1).combine(values), [[5, 6]])
    np.testing.assert_allclose(trimmed_mean(2).combine(values), [[4, 6]])
    np.testing.assert_allclose(trimmed_mean(0).combine(values), values.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(bulyan_mean(1).combine(values), [[7 / 3, 6]])  # 4, 2, 1 and 6, 5, 7
    assert coordinate_median().combine(values).dtype == np.float64
    assert coordinate_median().combine(values[:, 0, 0]) == 4


# References over vectors, written for reading.


def krum_order(updates: np.ndarray, left: list[int], neighbours: int) -> list[int]:
    def score(one: int) -> float:
        distances = sorted(float(np.sum((updates[one] - updates[other]) ** 2)) for other in left if other != one)
        return sum(distances[:neighbours])

    return sorted(left, key=score)


@given(st.integers(1, 4), st.integers(0, 4), st.integers(0, 10**6))
def test_krum_and_multi_krum_are_those_of_the_vectors(byzantine: int, more: int, seed: int) -> None:
    clients = 2 * byzantine + 3 + more
    updates, weights = cloud(seed, clients), rng(seed, "weights").uniform(1, 9, clients)
    order = krum_order(updates, list(range(clients)), clients - byzantine - 2)
    assert judged(krum(byzantine), updates, weights).weights[order[0]] == 1
    for kept in range(1, clients - byzantine + 1):
        expected = np.zeros(clients)
        expected[order[:kept]] = weights[order[:kept]]
        found = judged(multi_krum(byzantine, kept), updates, weights).weights
        np.testing.assert_allclose(found, expected / expected.sum(), rtol=1e-12)


@given(st.integers(1, 3), st.integers(0, 4), st.integers(0, 10**6))
def test_bulyan_is_that_of_the_vectors(byzantine: int, more: int, seed: int) -> None:
    clients = 4 * byzantine + 3 + more
    updates, left, chosen = cloud(seed, clients), list(range(clients)), []
    while len(chosen) < clients - 2 * byzantine:
        best = krum_order(updates, left, max(len(left) - byzantine - 2, byzantine + 1))[0]
        left.remove(best)
        chosen.append(best)
    expected = []
    for column in updates[sorted(chosen)].T:
        middle = np.median(column)
        nearest = sorted(column, key=lambda value: abs(value - middle))[: clients - 4 * byzantine]
        expected.append(sum(nearest) / len(nearest))
    np.testing.assert_allclose(bulyan(byzantine)(updates), expected, rtol=1e-9, atol=1e-12)


@given(st.integers(1, 9), st.integers(1, 5), st.integers(0, 10**6))
def test_no_point_has_less_distance_to_the_updates_than_the_geometric_median(
    clients: int, size: int, seed: int
) -> None:
    updates, weights = cloud(seed, clients, size), rng(seed, "weights").uniform(1, 9, clients)

    def total(point: np.ndarray) -> float:
        return float(weights @ np.linalg.norm(updates - point, axis=1))

    reference = weights @ updates / weights.sum()
    for _ in range(3000):
        pulls = weights / np.maximum(np.linalg.norm(updates - reference, axis=1), 1e-9)
        reference = pulls @ updates / pulls.sum()
    found = judged(geometric_median(), updates, weights).shares @ updates
    least = min(total(reference), *(total(update) for update in updates))
    smoothed = 1e-6 * np.linalg.norm(updates, axis=1).max()
    assert total(found) <= least * (1 + 1e-6) + weights.sum() * smoothed


@given(st.integers(0, 3), st.integers(1, 5), st.integers(0, 10**6))
def test_the_trimmed_mean_is_that_of_each_sorted_column(trimmed: int, more: int, seed: int) -> None:
    clients = 2 * trimmed + more
    values = cloud(seed, clients)
    expected = [sum(sorted(column)[trimmed : clients - trimmed]) / more for column in values.T]
    np.testing.assert_allclose(trimmed_mean(trimmed).combine(values), expected, rtol=1e-9, atol=1e-12)


def test_distances_are_those_of_the_vectors_and_never_below_zero() -> None:
    updates = cloud(0, 5)
    updates[3] = updates[1] * (1 + 1e-12)
    expected = [[np.sum((one - other) ** 2) for other in updates] for one in updates]
    found = squared_distances(updates @ updates.T)
    np.testing.assert_allclose(found, expected, atol=1e-13)
    assert (found >= 0).all()
    np.testing.assert_array_equal(np.diagonal(found), np.zeros(5))
    np.testing.assert_array_equal(squared_distances(np.array([[1.0, 1 + 1e-15], [1 + 1e-15, 1.0]])), np.zeros((2, 2)))


# Laws.


@pytest.mark.parametrize("name", JUDGES)
@given(byzantine=st.integers(1, 3), more=st.integers(0, 3), seed=st.integers(0, 10**6))
def test_a_verdict_is_a_mean_of_updates_none_made_larger(name: str, byzantine: int, more: int, seed: int) -> None:
    judge = JUDGES[name](byzantine)
    clients = judge.least_clients + more
    updates, weights = cloud(seed, clients), rng(seed, "weights").uniform(1, 9, clients)
    verdict = judged(judge, updates, weights)
    for part in verdict:
        assert part.shape == (clients,)
        assert part.dtype == np.float64
        assert (part >= 0).all()
    assert verdict.weights.sum() == pytest.approx(1, rel=1e-12)
    assert (verdict.scales <= 1).all()


@pytest.mark.parametrize("name", JUDGES)
@given(byzantine=st.integers(1, 3), seed=st.integers(0, 10**6), scale=st.floats(1e-6, 1e6))
def test_neither_order_nor_scale_of_the_updates_counts(name: str, byzantine: int, seed: int, scale: float) -> None:
    judge, random = JUDGES[name](byzantine), rng(seed, "order")
    clients = judge.least_clients + 4
    updates, weights = cloud(seed, clients), random.uniform(1, 9, clients)
    order = random.permutation(clients)
    for one, other in zip(
        judged(judge, updates, weights), judged(judge, scale * updates[order], 7 * weights[order]), strict=True
    ):
        np.testing.assert_allclose(other, one[order], atol=1e-5)


@pytest.mark.parametrize("name", COMBINES)
def test_the_order_of_clients_does_not_change_what_they_come_to(name: str) -> None:
    updates = cloud(5, 13)
    order = rng(5, "order").permutation(13)
    np.testing.assert_allclose(COMBINES[name](2)(updates[order]), COMBINES[name](2)(updates), atol=1e-6)


@pytest.mark.parametrize("name", COMBINES)
@given(byzantine=st.integers(1, 3), seed=st.integers(0, 10**6))
def test_updates_all_alike_are_left_alone(name: str, byzantine: int, seed: int) -> None:
    updates = np.tile(cloud(seed, 1), (4 * byzantine + 3, 1))
    np.testing.assert_allclose(COMBINES[name](byzantine)(updates), updates[0], rtol=1e-12)


@pytest.mark.parametrize("name", COMBINES)
def test_updates_of_nothing_come_to_nothing(name: str) -> None:
    np.testing.assert_array_equal(COMBINES[name](2)(np.zeros((11, 4))), np.zeros(4))


@pytest.mark.parametrize("name", ["geometric_median", "norm_bound", "coordinate_median"])
def test_one_client_gets_its_own_update_back(name: str) -> None:
    update = cloud(0, 1)
    np.testing.assert_allclose(COMBINES[name](0)(update), update[0], rtol=1e-14)
    np.testing.assert_allclose(trimmed_mean(0).combine(update), update[0], rtol=1e-14)


def test_ties_go_to_the_client_that_comes_first() -> None:
    np.testing.assert_array_equal(judged(krum(0), line(0, 1, 5)).weights, [1, 0, 0])
    np.testing.assert_array_equal(judged(multi_krum(1, 2), line(1, 0, 1, 0, 1)).weights, [0.5, 0, 0.5, 0, 0])
    np.testing.assert_allclose(judged(bulyan_selection(1), line(*[2] * 8)).weights, [1 / 6] * 6 + [0, 0])
    np.testing.assert_allclose(bulyan_mean(1).combine(line(0, 2, 4, 6, 8)), [4])
    np.testing.assert_allclose(bulyan_mean(1).combine(line(1, 2, 2, 3, 2, 3)), [7 / 4])


def test_inputs_are_not_changed() -> None:
    updates, weights = cloud(0, 15), np.arange(1.0, 16)
    gram = updates @ updates.T
    copies = updates.copy(), weights.copy(), gram.copy()
    for judge in JUDGES.values():
        judge(3).judge(gram, weights)
    for coordinate in COORDINATES.values():
        coordinate(3).combine(updates)
    for found, copy in zip((updates, weights, gram), copies, strict=True):
        np.testing.assert_array_equal(found, copy)


# Too few clients, and what must not be judged.


@pytest.mark.parametrize(
    ("rule", "least"),
    [
        (krum(1), 5),
        (krum(4), 11),
        (multi_krum(1), 5),
        (multi_krum(1, 4), 5),
        (multi_krum(1, 6), 7),
        (bulyan_selection(1), 7),
        (bulyan_selection(3), 15),
        (trimmed_mean(1), 3),
        (trimmed_mean(4), 9),
        (bulyan_mean(1), 5),
        (coordinate_median(), 1),
        (geometric_median(), 1),
        (norm_bound(), 1),
    ],
)
def test_a_rule_says_how_many_clients_it_needs_and_refuses_fewer(rule: Judge | Coordinate, least: int) -> None:
    assert rule.least_clients == least

    def apply(clients: int) -> np.ndarray:
        updates = cloud(1, clients)
        return rule.combine(updates) if isinstance(rule, Coordinate) else judged(rule, updates).shares

    assert np.isfinite(apply(least)).all()
    with pytest.raises(QuorumError, match=rf"expected at least {least} updates, .* found {least - 1}; enlarge"):
        apply(least - 1)


def test_what_the_selection_leaves_is_what_the_second_phase_needs() -> None:
    for byzantine in range(5):
        least = bulyan_selection(byzantine).least_clients
        assert least - 2 * byzantine == bulyan_mean(byzantine).least_clients


@pytest.mark.parametrize("name", JUDGES)
def test_nothing_broken_is_judged(name: str) -> None:
    updates = cloud(0, 7)
    gram = updates @ updates.T
    broken = gram.copy()
    broken[0, 0] = np.nan
    with pytest.raises(FederationError, match=r"expected finite updates, found NaN"):
        JUDGES[name](1).judge(broken, np.ones(7))
    for weight in (0.0, -1.0, np.nan, np.inf):
        with pytest.raises(FederationError, match=r"expected finite positive weights"):
            JUDGES[name](1).judge(gram, np.array([1.0, 1, 1, 1, 1, 1, weight]))


# Attacks: the honest agree on a direction, within a tenth of its length; the mean leaves their range.


ATTACKS: dict[str, Callable[[np.ndarray, np.random.Generator, int], np.ndarray]] = {
    "huge": lambda mean, random, count: 1e4 * random.standard_normal((count, mean.size)),
    "vast, together": lambda mean, random, count: np.tile(1e30 * random.standard_normal(mean.size), (count, 1)),
    "sign flip": lambda mean, random, count: -mean + 0.05 * random.standard_normal((count, mean.size)),
    "inner product": lambda mean, random, count: np.tile(-10 * mean, (count, 1)),
    "norm kept": lambda mean, random, count: np.tile(
        np.linalg.norm(mean) * np.eye(mean.size)[random.integers(mean.size)], (count, 1)
    ),
}


def honest_updates(seed: int, clients: int) -> np.ndarray:
    random = rng(seed, "honest")
    mean, noise = random.standard_normal(20), random.standard_normal((clients, 20))
    return mean + 0.1 * np.linalg.norm(mean) * noise / np.linalg.norm(noise, axis=1, keepdims=True)


def gap(point: np.ndarray, honest: np.ndarray) -> float:
    """Distance from the honest mean, over that of the farthest honest update."""
    mean = honest.mean(axis=0)
    return float(np.linalg.norm(point - mean) / np.linalg.norm(honest - mean, axis=1).max())


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("name", HOLDING)
@pytest.mark.parametrize("byzantine", [1, 2])
def test_attackers_among_ten_do_not_take_the_result_out_of_the_honest_range(
    name: str, attack: str, byzantine: int
) -> None:
    for seed in range(5):
        honest, random = honest_updates(seed, 10), rng(seed, "attack")
        updates = np.vstack([honest, ATTACKS[attack](honest.mean(axis=0), random, byzantine)])
        updates = updates[random.permutation(len(updates))]
        assert gap(updates.mean(axis=0), honest) > 1
        assert gap(COMBINES[name](byzantine)(updates), honest) < 1


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("name", sorted(set(HOLDING) - {"bulyan"}))
def test_rules_fire_with_five_clients(name: str, attack: str) -> None:
    for seed in range(5):
        honest, random = honest_updates(seed, 4), rng(seed, "attack")
        updates = np.vstack([ATTACKS[attack](honest.mean(axis=0), random, 1), honest])
        assert gap(updates.mean(axis=0), honest) > 1
        assert gap(COMBINES[name](1)(updates), honest) < 1


def test_bulyan_fires_with_seven_clients() -> None:
    honest = honest_updates(0, 6)
    for attack in ATTACKS.values():
        updates = np.vstack([attack(honest.mean(axis=0), rng(0, "attack"), 1), honest])
        assert gap(bulyan(1)(updates), honest) < 1


@given(st.integers(1, 3), st.integers(1, 4), st.integers(0, 10**6), st.floats(-30, 30))
def test_coordinates_stay_between_the_honest_whatever_the_attack(
    byzantine: int, more: int, seed: int, exponent: float
) -> None:
    honest, attack = cloud(seed, byzantine + more), cloud(seed + 1, byzantine) * 10.0**exponent
    updates = np.vstack([honest, attack])
    for combine in (coordinate_median().combine, trimmed_mean(byzantine).combine):
        found = combine(updates)
        assert (found >= honest.min(axis=0) - 1e-9).all()
        assert (found <= honest.max(axis=0) + 1e-9).all()


@given(st.integers(1, 5), st.integers(1, 4), st.integers(0, 10**6), st.floats(-2, 30))
def test_the_geometric_median_stays_within_its_bound_whatever_the_attack(
    byzantine: int, more: int, seed: int, exponent: float
) -> None:
    # It has no more distance to all than the honest mean has, so with a share s < 1/2 of attackers its distance D from
    # that mean has (1 - s) (D - r) - s D <= (1 - s) r, where r is the honest radius.
    honest, attack = cloud(seed, byzantine + more), np.tile(cloud(seed + 1, 1) * 10.0**exponent, (byzantine, 1))
    share = byzantine / (2 * byzantine + more)
    found = COMBINES["geometric_median"](byzantine)(np.vstack([honest, attack]))
    assert gap(found, honest) <= 2 * (1 - share) / (1 - 2 * share) * (1 + 1e-6)


def test_the_steps_of_the_geometric_median_do_not_grow_with_the_attack() -> None:
    honest = honest_updates(0, 6)
    for size in (1e3, 1e15, 1e30):
        updates = np.vstack([honest, np.full((5, 20), size)])
        assert gap(judged(geometric_median(iterations=30), updates).shares @ updates, honest) < 12


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_norm_bound_limits_the_pull_of_attackers_to_their_share(attack: str) -> None:
    honest = honest_updates(0, 10)
    updates = np.vstack([honest, ATTACKS[attack](honest.mean(axis=0), rng(0, "attack"), 3)])
    limit = np.median(np.linalg.norm(updates, axis=1))
    verdict = judged(norm_bound(), updates)
    assert (np.linalg.norm(verdict.scales[:, None] * updates, axis=1) <= limit * (1 + 1e-12)).all()
    pull = np.linalg.norm(verdict.shares[10:] @ updates[10:])
    assert pull <= 3 / 13 * limit * (1 + 1e-12)
    assert limit <= np.linalg.norm(honest, axis=1).max()
