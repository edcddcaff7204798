"""What hostile clients send is what the papers say, and it comes through the server's door as an honest answer does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fedpeft import rounds
from fedpeft.adapters import AdapterState, norm
from fedpeft.updates import ServerState, Update
from simulations.privacy import hostile
from simulations.privacy.hostile import ATTACKS, Situation
from tests import toys

RECEIVED = AdapterState(toys.SPEC, toys.numbers(1.0, 2.0, 4.0))


def situation(own: list[tuple[float, float, float]], honest: list[tuple[float, float, float]]) -> Situation:
    random = np.random.default_rng(0)
    return Situation(RECEIVED, *(tuple(toys.update(one) for one in some) for some in (own, honest)), random)


HONEST = [(1.0, 0.0, 2.0), (3.0, 0.0, 2.0), (2.0, 0.0, 5.0)]


def numbers(update: Update) -> list[float]:
    return [float(update.delta[key].item()) for key in ("head.weight", "layer.A", "layer.B")]


def test_a_flipped_sign_is_the_opposite_and_longer() -> None:
    (found,) = hostile.sign_flip(3.0)(situation([(1.0, -2.0, 0.5)], HONEST))
    assert numbers(found) == [-3.0, 6.0, -1.5]


def test_noise_is_as_long_as_it_should_be_and_not_twice_the_same() -> None:
    found = hostile.gaussian(3.0)(situation([(1.0, 1.0, 1.0)] * 2, HONEST))
    usual = np.median([norm(toys.update(one).delta) for one in HONEST])
    assert [norm(one.delta) for one in found] == pytest.approx([3 * usual] * 2, rel=1e-5)
    assert numbers(found[0]) != numbers(found[1])


def test_a_replacement_makes_the_mean_what_was_trained() -> None:
    made = situation([(2.0, 4.0, 6.0)] * 2, [(0.0, 0.0, 0.0)] * 4)
    sent = [*hostile.replacement(made), *made.honest]
    assert np.mean([numbers(one) for one in sent], axis=0).tolist() == [2.0, 4.0, 6.0]


def test_a_matched_norm_is_that_of_honest_updates_in_the_direction_that_was_trained() -> None:
    (found,) = hostile.norm_matched(situation([(0.0, 30.0, 40.0)], HONEST))
    usual = float(np.median([norm(toys.update(one).delta) for one in HONEST]))
    np.testing.assert_allclose(numbers(found), [0.0, 0.6 * usual, 0.8 * usual], rtol=1e-5)


def test_a_little_is_so_many_deviations_below_the_mean() -> None:
    # 50 clients, 12 hostile: 14 supporters, and Φ(z) = 24 / 38 for z = 0.3360; the floor of one deviation counts.
    honest = [(float(at), 0.0, 1.0) for at in range(38)]
    found = hostile.little_is_enough(situation([(9.0, 9.0, 9.0)] * 12, honest))
    mean, deviation = np.mean(range(38)), np.std(range(38))
    np.testing.assert_allclose(numbers(found[0]), [mean - deviation, 0.0, 1.0], rtol=1e-5)
    assert all(numbers(one) == numbers(found[0]) for one in found)
    # 20 of 41 hostile: one supporter is enough, so 20 / 21 of the honest may be nearer.
    found = hostile.little_is_enough(situation([(9.0, 9.0, 9.0)] * 20, honest[:21]))
    np.testing.assert_allclose(numbers(found[0])[0], 10 - 1.6684 * np.std(range(21)), atol=1e-3)


def test_an_inner_product_is_turned_by_the_opposite_of_the_honest_mean() -> None:
    found = hostile.inner_product(0.5)(situation([(9.0, 9.0, 9.0)] * 2, HONEST))
    assert [numbers(one) for one in found] == [[-1.0, 0.0, -1.5]] * 2


def test_another_gauge_is_another_adapter_that_does_the_same() -> None:
    own = (1.0, 3.0, -1.0)  # A from 2 to 5, B from 4 to 3
    (found,) = hostile.gauge(10.0)(situation([own], HONEST))
    head, a, b = numbers(found)
    assert head == 1.0
    assert (2 + a, 4 + b) == pytest.approx((50.0, 0.3))
    assert (2 + a) * (4 + b) == pytest.approx(5 * 3)


@pytest.mark.parametrize("name", ATTACKS)
def test_every_attack_sends_one_update_of_the_right_shape_for_each_attacker(name: str) -> None:
    made = situation([(1.0, -2.0, 0.5), (0.5, 1.0, 1.0)], HONEST)
    found = ATTACKS[name].forge(made)
    assert len(found) == 2
    for one, own in zip(found, made.own, strict=True):
        one.spec.require(one.delta, name)
        assert (one.examples, one.tokens) == (own.examples, own.tokens)


def step(root: Path, attackers: set[int], forge: hostile.Forge) -> tuple[ServerState, list[Mapping[int, Update]]]:
    """One round of three toys, each of whose three numbers goes half of the way from 0 to 4, 8 and 12."""
    strategy, start, heard = toys.strategy(), toys.state(), []
    inner = toys.transport(3, root)
    transport = hostile.hostile(
        inner, strategy, attackers, forge, lambda: start, lambda now, updates: heard.append(updates)
    )
    made = replace(toys.plan(cohort=3), rounds=1)
    after, record = rounds.step(strategy, made, start, transport, toys.nobody())
    assert not record["failures"]
    return after, heard


def test_attackers_alone_send_something_else_and_the_server_takes_it(tmp_path: Path) -> None:
    after, heard = step(tmp_path / "a", {1}, hostile.sign_flip(2.0))
    assert toys.flat(after.adapter.tensors) == pytest.approx([(2 - 8 + 6) / 3] * 3)
    assert [{p: numbers(one)[0] for p, one in updates.items()} for updates in heard] == [{0: 2.0, 1: -8.0, 2: 6.0}]
    after, _ = step(tmp_path / "b", set(), hostile.sign_flip(2.0))
    assert toys.flat(after.adapter.tensors) == pytest.approx([4.0] * 3)


def test_attackers_see_what_the_others_send(tmp_path: Path) -> None:
    after, _ = step(tmp_path, {0}, hostile.inner_product(1.0))
    assert toys.flat(after.adapter.tensors) == pytest.approx([(-5 + 4 + 6) / 3] * 3)
