from __future__ import annotations

import dataclasses

import pytest

from fedpeft.config import RunConfig, override
from fedpeft.config.node import RequiredConfig
from fedpeft.errors import PacketError
from fedpeft.nodes import PROTECTIONS, require_protections

CLIPPED = "aggregation.stages.clip_norm=0.5"

CENTRAL = ("privacy.mechanism=central", "privacy.central.noise_multiplier=1.5", "privacy.central.clip_norm=0.3")
SECURE = ("federation.channel.kind=secure", "federation.channel.secure.least_cohort=4")
EXAMPLE = ("privacy.mechanism=example", "privacy.example.noise_multiplier=1.5", "privacy.example.rows=400", "rounds=2")
LOCAL = ("privacy.mechanism=local", "privacy.local.noise_multiplier=1.5", "privacy.local.clip_norm=0.3")


def test_every_requirement_has_its_row() -> None:
    assert list(PROTECTIONS) == [item.name for item in dataclasses.fields(RequiredConfig)]


def test_a_node_that_requires_nothing_takes_part_in_any_run() -> None:
    require_protections(RunConfig(), RequiredConfig())


@pytest.mark.parametrize("asked", [0.5, 0.6, 10.0])
def test_clipping_that_is_tight_enough_suffices(asked: float) -> None:
    require_protections(override(RunConfig(), [CLIPPED]), RequiredConfig(clip_norm=asked))


@pytest.mark.parametrize(
    ("overrides", "required"),
    [
        (LOCAL, RequiredConfig(clip_norm=0.3, noise_multiplier=1.5, promised_noise_multiplier=1.5)),
        (CENTRAL, RequiredConfig(promised_noise_multiplier=1.5)),
        ((*LOCAL, "rounds=4"), RequiredConfig(epsilon=16.0)),
        (EXAMPLE, RequiredConfig(epsilon=16.0)),
        (SECURE, RequiredConfig(secure_aggregation=True, least_cohort=4)),
    ],
)
def test_protection_that_is_strong_enough_suffices(overrides: tuple[str, ...], required: RequiredConfig) -> None:
    require_protections(override(RunConfig(), overrides), required)


@pytest.mark.parametrize(
    ("overrides", "required", "expected"),
    [
        ((), RequiredConfig(clip_norm=1.0), "clip_norm: expected updates clipped to a norm of at most 1.0"),
        ((CLIPPED,), RequiredConfig(clip_norm=0.4), "a norm of at most 0.4, and no control variates, found 0.5"),
        ((CLIPPED, "training.scaffold=true"), RequiredConfig(clip_norm=1.0), "found none"),
        ((CLIPPED,), RequiredConfig(noise_multiplier=0.1), "noise of at least 0.1 times the clipping norm"),
        (CENTRAL, RequiredConfig(noise_multiplier=0.1), "added by the node itself, found none"),
        (CENTRAL, RequiredConfig(promised_noise_multiplier=1.6), "added by the node or by the server, found 1.5"),
        (CENTRAL, RequiredConfig(clip_norm=9.0), "expected updates clipped to a norm of at most 9.0"),
        (LOCAL, RequiredConfig(noise_multiplier=1.6), "added by the node itself, found 1.5"),
        (CENTRAL, RequiredConfig(epsilon=50.0), "all rounds come to at most ε = 50.0 at δ = 1e-05, found none"),
        ((*LOCAL, "rounds=4"), RequiredConfig(epsilon=12.0), "ε = 12.0 at δ = 1e-05, found 14.3"),
        ((*EXAMPLE, "rounds=40"), RequiredConfig(epsilon=2.0), "ε = 2.0 at δ = 1e-05, found"),
        (SECURE, RequiredConfig(least_cohort=5), "secure sums of at least 5 clients, found 4"),
        ((CLIPPED,), RequiredConfig(least_cohort=2), "secure sums of at least 2 clients, found none"),
        ((CLIPPED,), RequiredConfig(secure_aggregation=True), "expected secure aggregation, found none"),
    ],
)
def test_a_run_that_protects_less_is_refused(
    overrides: tuple[str, ...], required: RequiredConfig, expected: str
) -> None:
    with pytest.raises(PacketError) as caught:
        require_protections(override(RunConfig(), overrides), required)
    assert str(caught.value).startswith("this node's required.")
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)
