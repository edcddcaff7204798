"""What a node requires of a run before it takes part, and how a run's settings show it.

One row for each requirement: whatever learns to protect more adds what shows it here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fedpeft.config import RunConfig
from fedpeft.config.node import RequiredConfig
from fedpeft.errors import PacketError, sentence


@dataclass(frozen=True)
class Protection:
    """How a run shows that it protects as a node asks.

    `shown(config)` is what the run's settings promise, None where they promise nothing; `suffices(shown, asked)` says
    whether that is enough. `expected` has `{asked}` in it.
    """

    shown: Callable[[RunConfig], Any]
    suffices: Callable[[Any, Any], bool]
    expected: str
    remedy: str


def _clip_norm(config: RunConfig) -> float | None:
    """The norm that all that a node sends is clipped to; control variates travel beside it and are not clipped."""
    clipped = config.aggregation.stages.clip_norm
    return clipped if clipped and not config.training.scaffold else None


def _nothing(config: RunConfig) -> None:
    """No settings of a run promise this."""


PROTECTIONS: Mapping[str, Protection] = {
    "clip_norm": Protection(
        _clip_norm,
        lambda shown, asked: bool(shown <= asked),
        "updates clipped to a norm of at most {asked}, and no control variates",
        "set aggregation.stages.clip_norm, and training.scaffold to false",
    ),
    "noise_multiplier": Protection(
        _nothing,
        lambda shown, asked: bool(shown >= asked),
        "noise of at least {asked} times the clipping norm on updates",
        "leave this node out, because no run can add noise yet",
    ),
    "secure_aggregation": Protection(
        _nothing,
        lambda shown, asked: bool(shown or not asked),
        "secure aggregation",
        "leave this node out, because no run has secure aggregation yet",
    ),
}
"""By the name of the requirement in a node's `required`."""


def require_protections(config: RunConfig, required: RequiredConfig) -> None:
    """The run's settings protect at least as `required` asks; 0 and false ask for nothing.

    Raises:
        PacketError: they do not, or do not show it.
    """
    for name, protection in PROTECTIONS.items():
        asked, shown = getattr(required, name), protection.shown(config)
        if asked and (shown is None or not protection.suffices(shown, asked)):
            raise PacketError(
                sentence(
                    f"this node's required.{name}",
                    expected=protection.expected.format(asked=asked),
                    found="none" if shown is None else shown,
                    remedy=protection.remedy,
                )
            )
