"""What a node requires of a run before it takes part, and how a run's settings show it.

One row for each requirement: whatever learns to protect more adds what shows it here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fedpeft.config import RunConfig
from fedpeft.config.node import RequiredConfig
from fedpeft.config.privacy import ExampleLevel, LocalPrivacy, Promise
from fedpeft.errors import PacketError, sentence
from fedpeft.experiment import population_of
from fedpeft.privacy import epsilon

DELTA = 1e-5
"""The δ of the ε that a node lets a run come to."""


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
    own = config.privacy.chosen
    bounds = [config.aggregation.stages.clip_norm, own.clip_norm if isinstance(own, LocalPrivacy) else 0.0]
    clipped = min((bound for bound in bounds if bound), default=0.0)
    return clipped if clipped and not config.training.scaffold else None


def _own_noise(config: RunConfig) -> float | None:
    """The noise that the node adds itself."""
    own = config.privacy.chosen
    return own.noise_multiplier if isinstance(own, LocalPrivacy) else None


def _any_noise(config: RunConfig) -> float | None:
    """The noise that the node adds, or that the server promises to add."""
    promise = config.privacy.chosen
    return promise.noise_multiplier if isinstance(promise, Promise) else None


def _own_epsilon(config: RunConfig) -> float | None:
    """What all rounds of the run come to for a node that trains in each and adds the noise itself."""
    own = config.privacy.chosen
    if not isinstance(own, LocalPrivacy | ExampleLevel):
        return None
    return epsilon((own.expense(population_of(config)),) * config.rounds, DELTA)


def _secure(config: RunConfig) -> bool | None:
    """That the server sees sums alone."""
    return config.federation.channel.name == "secure" or None


def _least_cohort(config: RunConfig) -> int | None:
    """The fewest clients in a sum; the node also sees to it in every round."""
    return config.federation.channel.chosen.least_cohort if _secure(config) else None


PROTECTIONS: Mapping[str, Protection] = {
    "clip_norm": Protection(
        _clip_norm,
        lambda shown, asked: bool(shown <= asked),
        "updates clipped to a norm of at most {asked}, and no control variates",
        "set aggregation.stages.clip_norm, and training.scaffold to false",
    ),
    "noise_multiplier": Protection(
        _own_noise,
        lambda shown, asked: bool(shown >= asked),
        "noise of at least {asked} times the clipping norm, added by the node itself",
        "set privacy.mechanism=local, with at least that noise_multiplier",
    ),
    "promised_noise_multiplier": Protection(
        _any_noise,
        lambda shown, asked: bool(shown >= asked),
        "noise of at least {asked} times the clipping norm, added by the node or by the server",
        "set privacy.mechanism=central or local, with at least that noise_multiplier",
    ),
    "epsilon": Protection(
        _own_epsilon,
        lambda shown, asked: bool(shown <= asked),
        f"noise that the node adds itself, with which all rounds come to at most ε = {{asked}} at δ = {DELTA:g}",
        "set privacy.mechanism=local or example with more noise, or run fewer rounds",
    ),
    "secure_aggregation": Protection(
        _secure,
        lambda shown, asked: bool(shown or not asked),
        "secure aggregation",
        "set federation.channel.kind=secure",
    ),
    "least_cohort": Protection(
        _least_cohort,
        lambda shown, asked: bool(shown >= asked),
        "secure sums of at least {asked} clients",
        "set federation.channel.kind=secure and its least_cohort to that",
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
                    found="none" if shown is None else f"{shown:.6g}" if isinstance(shown, float) else shown,
                    remedy=protection.remedy,
                )
            )
