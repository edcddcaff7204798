"""Updates as integers and back, and the noise that clients add to them."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import chi2

from fedpeft.adapters import AdapterSpec, ModuleSpec, norm
from fedpeft.privacy import Channel, ClientNoise
from fedpeft.privacy.channel import as_integers, as_mean, coordinates
from fedpeft.privacy.secure.discrete_gaussian import concentration
from fedpeft.privacy.secure.fixed_point import rounded_norm, rounded_norm_1

FLAT = AdapterSpec("base", "ia3", (ModuleSpec("layer", "ia3", 0, 1.0, (("l", (200,)),)),))
LORA = AdapterSpec("base", "lora", (ModuleSpec("layer", "lora", 3, 1.0, (("A", (3, 8)), ("B", (6, 3)))),))
QUIET = Channel(1.0, 20, 3, 0.3, 0.0)


def normal(spec: AdapterSpec, scale: float, seed: int = 0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {key: (scale * random.normal(size=shape)).astype(np.float32) for key, shape in spec.shapes.items()}


def test_a_sum_of_integers_is_the_mean_of_updates_but_for_their_steps() -> None:
    deltas = [normal(FLAT, 0.01, seed) for seed in range(4)]
    total = np.sum([as_integers(QUIET, delta, FLAT, {}, 4)[0] for delta in deltas], axis=0)
    found = as_mean(QUIET, total, 4, FLAT, {})
    expected = np.mean([delta["layer.l"] for delta in deltas], axis=0)
    np.testing.assert_allclose(found["layer.l"], expected, atol=QUIET.grid.step)


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e8])
def test_no_update_reaches_further_than_the_clip(size: float) -> None:
    values, length = as_integers(QUIET, normal(FLAT, size), FLAT, {}, 4)
    assert length == pytest.approx(norm(normal(FLAT, size)))
    assert np.linalg.norm(values) * QUIET.grid.step <= 1.0 + QUIET.grid.step * math.sqrt(200)


def test_with_noise_an_update_is_clipped_by_what_it_does() -> None:
    channel = Channel(1.0, 24, 3, 0.0, 0.0, ClientNoise(1e-3, 4))
    adapter = normal(LORA, 3.0)
    shared = LORA.only(["layer.B"])
    sides = coordinates(channel, LORA, adapter, shared)
    values, _ = as_integers(channel, {"layer.B": normal(LORA, 50.0)["layer.B"]}, shared, sides, 4)
    found = as_mean(channel, values, 1, shared, sides)["layer.B"] * 4
    assert norm({"w": found.astype(np.float64) @ adapter["layer.A"]}) == pytest.approx(1.0, rel=0.01)


@pytest.mark.parametrize("multiplier", [0.5, 3.0])
def test_the_noise_of_those_who_must_stay_costs_no_more_than_is_promised(multiplier: float) -> None:
    channel = Channel(0.5, 20, 3, 0.4, 0.1, ClientNoise(multiplier, 10))
    variance, stay = channel.variance(10, 200), 6 - 1
    reach = rounded_norm(0.5 / channel.grid.step, 200, math.exp(-0.5))
    cost = concentration(variance, stay, reach, rounded_norm_1(reach, 200), 200)
    assert cost <= 0.5 / multiplier**2
    assert cost > 0.99 * 0.5 / multiplier**2


def test_noise_on_the_mean_has_the_deviation_that_is_accounted() -> None:
    channel, clients = Channel(0.5, 20, 3, 0.0, 0.0, ClientNoise(1.5, 8)), 8
    zeros = {"layer.l": np.zeros(200, np.float32)}
    squares, rounds = 0.0, 30
    for _ in range(rounds):
        total = np.sum([as_integers(channel, zeros, FLAT, {}, clients)[0] for _ in range(clients)], axis=0)
        squares += norm(as_mean(channel, total, clients, FLAT, {})) ** 2
    expected = clients * channel.variance(clients, 200) * channel.grid.step**2 / 8**2
    assert expected >= (1.5 * 0.5 / 8) ** 2
    low, high = chi2.ppf([1e-4, 1 - 1e-4], rounds * 200)
    assert low < squares / expected < high


def test_a_sum_has_room_for_the_noise() -> None:
    quiet, loud = QUIET, Channel(1.0, 20, 3, 0.3, 0.0, ClientNoise(8.0, 4))
    assert quiet.width(4, 200) == quiet.grid.width(4)
    assert loud.width(4, 200) > quiet.width(4, 200) + 3
