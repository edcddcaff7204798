from __future__ import annotations

import dataclasses

import pytest

from fedpeft.config import RunConfig, override
from fedpeft.config.node import RequiredConfig
from fedpeft.errors import PacketError
from fedpeft.nodes import PROTECTIONS, require_protections

CLIPPED = "aggregation.stages.clip_norm=0.5"


def test_every_requirement_has_its_row() -> None:
    assert list(PROTECTIONS) == [item.name for item in dataclasses.fields(RequiredConfig)]


def test_a_node_that_requires_nothing_takes_part_in_any_run() -> None:
    require_protections(RunConfig(), RequiredConfig())


@pytest.mark.parametrize("asked", [0.5, 0.6, 10.0])
def test_clipping_that_is_tight_enough_suffices(asked: float) -> None:
    require_protections(override(RunConfig(), [CLIPPED]), RequiredConfig(clip_norm=asked))


@pytest.mark.parametrize(
    ("overrides", "required", "expected"),
    [
        ((), RequiredConfig(clip_norm=1.0), "clip_norm: expected updates clipped to a norm of at most 1.0"),
        ((CLIPPED,), RequiredConfig(clip_norm=0.4), "a norm of at most 0.4, and no control variates, found 0.5"),
        ((CLIPPED, "training.scaffold=true"), RequiredConfig(clip_norm=1.0), "found none"),
        ((CLIPPED,), RequiredConfig(noise_multiplier=0.1), "noise of at least 0.1 times the clipping norm"),
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
