"""The private mean: how far one client reaches, how much noise falls on it, and in which coordinates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import chi2

from fedpeft.adapters import AdapterState, Tensors, at_rank, norm
from fedpeft.merges import Contribution, Merged, rule
from fedpeft.privacy import Adaptive, Central, column_norm, count_noise, private, square_root, update_noise
from fedpeft.privacy.geometry import geometry
from fedpeft.updates import Privacy, ServerState, Update
from tests.toys import WIDE, counted, wide_state

HEAD, B = "head.weight", ("left.B", "right.B")
STILL = Central(clip_norm=2.0, noise_multiplier=1e-12, cohort=3, entropy="seed")


def start(seed: int = 0, round_: int = 0, **privacy: object) -> ServerState:
    random = np.random.default_rng(5)
    tensors = {key: random.normal(size=shape).astype(np.float32) for key, shape in WIDE.shapes.items()}
    state = replace(wide_state(round_), adapter=AdapterState(WIDE, tensors), seed=seed)
    return replace(state, privacy=Privacy(**privacy))  # type: ignore[arg-type]


def merged(central: Central, deltas: Sequence[Tensors], keys: Sequence[str], state: ServerState) -> Merged:
    merge = private(rule("uniform"), central)
    fold = merge.init(state, tuple(keys), ())
    for delta in deltas:
        update = Update(WIDE.only(delta), delta, 1, 1)
        fold = merge.add(fold, Contribution(update, state.adapter, 1.0))
    return merge.finish(fold)


def random_delta(seed: int, keys: Sequence[str], scale: float = 1.0, rank: int = 4) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    shapes = at_rank(WIDE, rank).shapes
    return {key: (scale * random.normal(size=shapes[key])).astype(np.float32) for key in keys}


def reach(delta: Tensors, state: ServerState) -> float:
    """The norm of what `delta` does: of products where only B is there, of the numbers elsewhere."""
    found = {HEAD: delta[HEAD].astype(np.float64)} if HEAD in delta else {}
    for key in B:
        if key in delta:
            found[key] = delta[key].astype(np.float64) @ state.adapter.tensors[key[:-1] + "A"].astype(np.float64)
    return norm(found)


def test_short_updates_come_to_their_sum_over_the_planned_cohort() -> None:
    keys, state = (HEAD, *B), start()
    deltas = [random_delta(seed, keys, 0.01) for seed in range(2)]
    found = merged(STILL, deltas, keys, state).delta
    for key in keys:
        np.testing.assert_allclose(found[key], (deltas[0][key] + deltas[1][key]) / 3, rtol=1e-5, atol=1e-9)


def test_a_round_that_nobody_came_to_is_noise_alone() -> None:
    found = merged(replace(STILL, noise_multiplier=1.0), [], (HEAD, *B), start())
    assert all(np.abs(value).min() > 0 for value in found.delta.values())


@pytest.mark.parametrize("keys", [(HEAD, *B), ("left.A", "right.A"), tuple(WIDE.shapes)])
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3, 1e9])
def test_one_client_more_moves_the_sum_by_no_more_than_the_clip(keys: tuple[str, ...], size: float) -> None:
    """The search goes over updates of all lengths, along one tensor, one entry, or all of them."""
    state = start()
    others = [random_delta(seed, keys, 1.0) for seed in range(3)]
    sides = geometry(WIDE, state.adapter.tensors, keys)
    without = merged(STILL, others, keys, state).delta
    for seed in range(30):
        one = random_delta(100 + seed, keys, size)
        if seed % 3 == 0:
            one = {key: value * (key == keys[seed % len(keys)]) for key, value in one.items()}
        if seed % 3 == 1:
            one = {
                key: np.where(np.arange(value.size).reshape(value.shape) == 0, value, 0) for key, value in one.items()
            }
        moved = merged(STILL, [*others, one], keys, state).delta
        change = {key: (moved[key].astype(np.float64) - without[key]) * STILL.cohort for key in keys}
        far = norm({key: sides[key].there(value) for key, value in change.items()})
        assert far <= STILL.clip_norm * (1 + 1e-4) + 1e-5


def test_a_large_frozen_factor_lends_no_reach() -> None:
    state = start()
    large = {key: value * 30 if key.endswith("A") else value for key, value in state.adapter.tensors.items()}
    delta = random_delta(1, B, 100.0)
    for tensors in (state.adapter.tensors, large):
        there = replace(state, adapter=AdapterState(WIDE, tensors))
        found = merged(STILL, [delta], B, there).delta
        assert reach(found, there) == pytest.approx(STILL.clip_norm / STILL.cohort, rel=1e-5)


def test_a_lower_rank_is_clipped_by_what_it_does() -> None:
    state = start()
    delta = random_delta(1, B, 100.0, rank=2)
    found = merged(STILL, [delta], B, state).delta
    assert reach(found, state) == pytest.approx(STILL.clip_norm / STILL.cohort, rel=1e-5)
    np.testing.assert_allclose(found["left.B"][:, 2:], 0.0, atol=1e-11)


@pytest.mark.parametrize(
    ("keys", "dimensions"), [((HEAD, *B), 1 + 24 + 16), (tuple(WIDE.shapes), sum(v.size for v in counted().values()))]
)
def test_noise_on_what_is_released_has_the_deviation_that_is_accounted(keys: tuple[str, ...], dimensions: int) -> None:
    central = Central(clip_norm=0.5, noise_multiplier=1.7, cohort=4, entropy="seed")
    drawn, sides = 400, geometry(WIDE, start().adapter.tensors, keys)
    squares = 0.0
    for seed in range(drawn):
        found = merged(central, [], keys, start(seed)).delta
        squares += norm({key: sides[key].there(value) for key, value in found.items()}) ** 2
    expected = (1.7 * 0.5 / 4) ** 2
    low, high = chi2.ppf([1e-4, 1 - 1e-4], drawn * dimensions)
    assert low < squares / expected < high


def test_without_a_seed_two_rounds_alike_have_unlike_noise() -> None:
    central = replace(STILL, noise_multiplier=1.0, entropy="os")
    one, two = (merged(central, [], B, start()).delta for _ in range(2))
    assert not np.array_equal(one["left.B"], two["left.B"])


@pytest.mark.parametrize("first", [0.02, 50.0])
def test_an_adaptive_clip_comes_to_the_median_of_the_norms_before_clipping(first: float) -> None:
    central = replace(STILL, clip_norm=first, cohort=101, adaptive=Adaptive(), noise_multiplier=0.1, entropy="seed")
    lengths = np.exp(np.linspace(-1, 1, 101))
    deltas = [{HEAD: np.array([length], np.float32)} for length in lengths]
    state = start()
    for round_ in range(80):
        found = merged(central, deltas, (HEAD,), replace(state, round=round_)).privacy
        assert found is not None
        state = replace(state, privacy=found)
    assert state.privacy.clip_norm == pytest.approx(1.0, rel=0.15)


def test_the_count_of_short_updates_is_paid_for() -> None:
    noise, cohort = 1.3, 50
    on_count = count_noise(Adaptive(), noise, cohort)
    own = update_noise(noise, on_count)
    assert own**-2 + (2 * on_count) ** -2 == pytest.approx(noise**-2)
    assert own < 1.06 * noise
    assert update_noise(1.0, 0.4) == math.inf
    central = Central(1.0, noise, cohort, Adaptive(), entropy="seed")
    assert merged(central, [], (HEAD,), start()).measures["noise_deviation"] == pytest.approx(own / cohort)


def test_banded_noise_is_the_inverse_of_the_square_root_of_sums() -> None:
    """Against the dense matrices: noise of all rounds is C⁻¹ z, and C C is the matrix of running sums, within bands."""
    rounds = bands = 6
    coefficients = square_root(bands)
    c = sum(coefficient * np.eye(rounds, k=-at) for at, coefficient in enumerate(coefficients))
    np.testing.assert_allclose(c @ c, np.tri(rounds), atol=1e-12)
    central = Central(1.0, 2.0, 1, coefficients=coefficients[:3], entropy="seed")
    c = sum(coefficient * np.eye(rounds, k=-at) for at, coefficient in enumerate(coefficients[:3]))
    state, seen = start(), []
    for round_ in range(rounds):
        found = merged(central, [], (HEAD,), replace(state, round=round_))
        assert found.privacy is not None
        state = replace(state, privacy=found.privacy)
        seen.append(float(found.delta[HEAD][0]))
    fresh = c @ np.array(seen)
    alone = replace(central, coefficients=(1.0,))
    own = [float(merged(alone, [], (HEAD,), start(round_=round_)).delta[HEAD][0]) for round_ in range(rounds)]
    np.testing.assert_allclose(fresh, column_norm(coefficients[:3]) * np.array(own), rtol=1e-4)


def test_sums_of_banded_noise_are_smaller_than_of_noise_of_its_own() -> None:
    totals = {}
    for bands in (1, 8):
        central = Central(1.0, 1.0, 1, coefficients=square_root(bands), entropy="seed")
        ends = []
        for seed in range(60):
            state, total = start(seed), 0.0
            for round_ in range(32):
                found = merged(central, [], (HEAD,), replace(state, round=round_))
                assert found.privacy is not None
                state, total = replace(state, privacy=found.privacy), total + float(found.delta[HEAD][0])
            ends.append(total)
        totals[bands] = np.std(ends)
    assert totals[8] < 0.75 * totals[1]
