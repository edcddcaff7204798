from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest

from fedpeft.adapters import Tensors
from fedpeft.config.fields import choose
from fedpeft.config.optimizers import OPTIMIZERS, Adagrad, Adam, Momentum, Sgd, Yogi
from fedpeft.errors import ConfigError
from fedpeft.optimizers import Optimizer, adagrad, adam, momentum, sgd, yogi
from tests.toys import SPEC, flat, numbers

POSITIVE = r": expected a number above 0 that float32 can hold, found "
DECAY = r": expected a number of at least 0 and below 1, found "


def rounds(rule: Optimizer) -> list[list[float]]:
    """State and adapter after three unlike rounds."""
    state: Tensors = rule.init(SPEC)
    adapter: Tensors = numbers(1, 2, 3)
    for delta in ((0.004, -0.02, 1), (-0.001, 0.5, 0), (0.003, 0.01, -0.2)):
        state, adapter = rule.apply(state, adapter, numbers(*delta))
    return [flat(state), flat(adapter)]


@pytest.mark.parametrize(
    ("name", "settings", "rule"),
    [
        ("sgd", (), sgd(1.0)),
        ("sgd", (0.3,), sgd(0.3)),
        ("momentum", (), momentum(1.0, 0.9, "sum")),
        ("momentum", (0.3, 0.8, "average"), momentum(0.3, 0.8, "average")),
        ("adagrad", (), adagrad(0.01, 0.0, 1e-3, 1e-3**2)),
        ("adagrad", (0.3, 0.4, 0.5, 2.0), adagrad(0.3, 0.4, 0.5, 0.5)),
        ("adam", (), adam(0.01, 0.9, 0.99, 1e-3, 1e-3**2, False)),
        ("adam", (0.3, 0.4, 0.6, 0.5, 2.0, True), adam(0.3, 0.4, 0.6, 0.5, 0.5, True)),
        ("yogi", (), yogi(0.01, 0.9, 0.99, 1e-3, 1e-3**2, False)),
        ("yogi", (0.3, 0.4, 0.6, 0.5, 2.0, True), yogi(0.3, 0.4, 0.6, 0.5, 0.5, True)),
    ],
)
def test_settings_build_what_they_say(name: str, settings: tuple[Any, ...], rule: Optimizer) -> None:
    built = OPTIMIZERS.members[name](*settings).build()
    assert rounds(built) == rounds(rule)
    assert built.plain == rule.plain


CHANGED: dict[str, Any] = {
    "learning_rate": 0.25,
    "beta": 0.5,
    "beta1": 0.5,
    "beta2": 0.5,
    "tau": 0.25,
    "initial_accumulator": 0.0,
    "bias_correction": True,
    "convention": "average",
}


@pytest.mark.parametrize(
    ("kind", "key"), [(kind, item.name) for kind in OPTIMIZERS.members.values() for item in dataclasses.fields(kind)]
)
def test_every_setting_is_heard(kind: type, key: str) -> None:
    assert rounds(kind(**{key: CHANGED[key]}).build())[1] != rounds(kind().build())[1]


def test_the_accumulator_starts_at_tau_squared_unless_told_otherwise() -> None:
    for kind in (Adagrad, Adam, Yogi):
        for settings, start in ((kind(tau=0.5), 0.25), (kind(tau=0.5, initial_accumulator=0.0), 0.0)):
            state = settings.build().init(SPEC)
            assert [state[f"second_moment/{key}"].item() for key in SPEC.shapes] == [start] * 3


def test_only_the_default_is_plain() -> None:
    assert [name for name in OPTIMIZERS.members if choose(OPTIMIZERS, name).chosen.build().plain] == ["sgd"]


@pytest.mark.parametrize("bad", [0.0, -0.1, float("nan"), float("inf"), 1e39, 1e-39])
@pytest.mark.parametrize(
    ("kind", "key"),
    [(kind, "learning_rate") for kind in (Momentum, Adagrad, Adam, Yogi)] + [(k, "tau") for k in (Adagrad, Adam, Yogi)],
)
def test_rates_and_tau_are_above_zero(kind: type, key: str, bad: float) -> None:
    with pytest.raises(ConfigError, match=f"^{key}{POSITIVE}{re.escape(str(bad))}; correct the value\\.$"):
        kind(**{key: bad})


@pytest.mark.parametrize("bad", [-0.1, 1.0, 1.5, float("nan")])
@pytest.mark.parametrize(
    ("kind", "key"),
    [(Momentum, "beta"), (Adagrad, "beta1"), (Adam, "beta1"), (Adam, "beta2"), (Yogi, "beta1"), (Yogi, "beta2")],
)
def test_decays_are_below_one(kind: type, key: str, bad: float) -> None:
    with pytest.raises(ConfigError, match=f"^{key}{DECAY}{bad}; correct the value\\.$"):
        kind(**{key: bad})
    kind(**{key: 0.0})


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("kind", [Adagrad, Adam, Yogi])
def test_the_accumulator_starts_at_zero_or_above(kind: type, bad: float) -> None:
    with pytest.raises(ConfigError, match=rf"^initial_accumulator: expected a number between 0\.0 and .*, found {bad}"):
        kind(initial_accumulator=bad)


def test_an_unknown_convention_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"^convention: expected one of sum, average, found 'mean'; choose one of them\.$"
    ):
        Momentum(convention="mean")


def test_sgd_refuses_a_rate_of_zero() -> None:
    with pytest.raises(ConfigError, match=r"^learning_rate: expected a number above 0, found 0\.0;"):
        Sgd(0.0)
