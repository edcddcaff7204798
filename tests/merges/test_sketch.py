"""The mean of products from two sums, against dense arithmetic."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fedpeft.adapters import Factors
from fedpeft.merges import products, sketch
from fedpeft.privacy.secure.fixed_point import Grid, quantised, real

OUT, IN = 40, 30


def _clients(seed: int, ranks: tuple[int, ...], shape: tuple[int, int] = (OUT, IN)) -> list[Factors]:
    random = np.random.default_rng(seed)
    return [Factors(random.normal(size=(shape[0], r)), random.normal(size=(r, shape[1]))) for r in ranks]


def _dense(clients: list[Factors]) -> np.ndarray:
    return sum((one.b @ one.a for one in clients), np.zeros((OUT, IN))) / len(clients)


def _two_passes(clients: list[Factors], width: int, seed: int = 0, stayed: int | None = None) -> Factors:
    omega = sketch.directions(seed, 1, "layer", IN, width)
    q = sketch.basis(sum(sketch.first(one, omega) for one in clients))
    left = clients[:stayed]
    return sketch.mean(q, sum(sketch.second(one, q) for one in left), len(left))


def _gap(found: Factors, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(found.b @ found.a - wanted))


@pytest.mark.parametrize("ranks", [(4,), (1, 2, 5), (2, 2, 2, 2)])
def test_unlike_ranks_that_fit_the_width_give_the_exact_mean(ranks: tuple[int, ...]) -> None:
    clients = _clients(1, ranks)
    wanted = _dense(clients)
    assert _gap(_two_passes(clients, 8), wanted) < 1e-12 * np.linalg.norm(wanted)


def test_who_is_missing_from_the_second_sum_leaves_the_exact_mean_of_those_who_stayed() -> None:
    clients = _clients(2, (1, 3, 4))
    wanted = _dense(clients[:2])
    assert _gap(_two_passes(clients, 8, stayed=2), wanted) < 1e-12 * np.linalg.norm(wanted)


def test_with_rows_in_common_the_first_sum_hides_what_those_who_stayed_do() -> None:
    one, other = _clients(2, (2, 2))
    clients = [one, Factors(other.b, one.a)]
    assert _gap(_two_passes(clients, 8), _dense(clients)) < 1e-12 * np.linalg.norm(_dense(clients))
    alone = _dense(clients[:1])
    assert _gap(_two_passes(clients, 4, stayed=1), alone) > 0.1 * np.linalg.norm(alone)


@pytest.mark.parametrize("seed", range(8))
def test_more_clients_than_the_width_are_near_the_best_at_the_rank(seed: int) -> None:
    rank, clients = 4, _clients(seed, (2,) * 20)
    wanted, width = _dense(clients), sketch.width_of(0, 4, (OUT, IN))
    best = products.truncate(products.stack([products.scaled(one, 1 / 20) for one in clients]), rank)
    expected = math.sqrt(1 + rank / (width - rank - 1)) * best.spectrum.dropped
    assert _gap(_two_passes(clients, width, seed), wanted) <= expected
    cut = products.truncate(_two_passes(clients, width, seed), rank).factors
    assert best.spectrum.dropped * (1 - 1e-9) <= _gap(cut, wanted) <= 1.2 * best.spectrum.dropped


def test_updates_of_zero_give_zero() -> None:
    clients = [Factors(np.zeros((OUT, 2)), np.ones((2, IN)))] * 3
    assert _gap(_two_passes(clients, 8), np.zeros((OUT, IN))) == 0.0


def test_what_lacks_rank_is_exact_where_its_true_rank_fits() -> None:
    one = _clients(3, (2,))[0]
    clients = [Factors(np.repeat(one.b, 8, axis=1), np.repeat(one.a, 8, axis=0))] * 5
    wanted = _dense(clients)
    assert _gap(_two_passes(clients, 4), wanted) < 1e-12 * np.linalg.norm(wanted)


def test_sums_of_integers_give_the_mean_to_their_resolution() -> None:
    clients = _clients(4, (1, 2, 3))
    grid, omega = Grid(4 * max(products.frobenius(one) for one in clients), 20), sketch.directions(0, 1, "x", IN, 8)

    def summed(sent: list[np.ndarray]) -> np.ndarray:
        total = sum(quantised(one.ravel(), grid) for one in sent)
        return real(total, grid).reshape(sent[0].shape)

    q = sketch.basis(summed([sketch.first(one, omega) for one in clients]))
    found = sketch.mean(q, summed([sketch.second(one, q) for one in clients]), len(clients))
    wanted = _dense(clients)
    steps = grid.step * math.sqrt(OUT * IN)
    assert 0 < _gap(found, wanted) < 20 * steps


def test_directions_are_those_of_seed_round_and_module_alone() -> None:
    drawn = sketch.directions(3, 2, "layer", IN, 8)
    assert np.array_equal(drawn, sketch.directions(3, 2, "layer", IN, 8))
    others = [(4, 2, "layer"), (3, 3, "layer"), (3, 2, "other")]
    assert not any(np.array_equal(drawn, sketch.directions(*other, IN, 8)) for other in others)


def test_what_is_sent_has_the_same_shape_at_every_rank_and_the_width_is_capped() -> None:
    omega = sketch.directions(0, 1, "layer", IN, 8)
    for one in _clients(5, (1, 7)):
        sent = sketch.first(one, omega)
        assert sent.shape == (OUT, 8)
        assert sketch.second(one, sketch.basis(sent)).shape == (8, IN)
    assert sketch.width_of(0, 4, (OUT, IN)) == 16
    assert sketch.width_of(0, 64, (OUT, IN)) == IN
    assert sketch.width_of(9, 4, (OUT, IN)) == 9


def test_the_loss_is_known_from_the_first_sum_and_no_less_than_it_is() -> None:
    ratios = []
    for seed in range(40):
        clients, width = _clients(seed, (2,) * 12), 16
        total = sum(sketch.first(one, sketch.directions(seed, 1, "layer", IN, width)) for one in clients)
        outside = _dense(clients) * len(clients)
        q = sketch.basis(total)
        told = sketch.lost(total, IN)
        ratios.append(told / np.linalg.norm(outside - q @ (q.T @ outside)))
    assert 1.0 < float(np.median(ratios)) < 1.5
    assert min(ratios) > 0.7


def test_nothing_is_lost_where_the_ranks_fit_or_the_width_is_all_there_is() -> None:
    clients = _clients(6, (1, 2, 3))
    exact = sum(sketch.first(one, sketch.directions(0, 1, "layer", IN, 12)) for one in clients)
    assert sketch.lost(exact, IN) < 1e-12 * np.linalg.norm(exact)
    many = _clients(6, (5,) * 9)
    full = sum(sketch.first(one, sketch.directions(0, 1, "layer", IN, IN)) for one in many)
    assert sketch.lost(full, IN) == 0.0
    assert _gap(_two_passes(many, IN), _dense(many)) < 1e-10
