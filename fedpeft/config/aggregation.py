"""Settings of everything between a client's delta and the server's next adapter."""

from __future__ import annotations

from dataclasses import dataclass, field

from fedpeft.config.codecs import CODECS
from fedpeft.config.fields import Choice, choice, require, require_range
from fedpeft.config.merges import MERGES
from fedpeft.config.optimizers import OPTIMIZERS
from fedpeft.stages import Stage, chain, clip, freeze, keep_local, keep_silent, take_turns

FIRST = ("sent", "built")
"""How the first adapter comes to a node."""


@dataclass(frozen=True)
class StagesConfig:
    """What happens to a delta on its way to the wire, in this order; an empty list or 0 leaves a stage out.

    `frozen` tensors are not trained, `local` ones are trained and stay with their site (patterns as in
    `fnmatch`, against `module.path.tensor`); with `turns` above 1 the adapter's layers take turns in so many groups,
    one a round. A site whose update is shorter than `silent_below` times its usual one says nothing, at most
    `silent_rounds` times in a row, and sends what it kept back with the next. What is sent is clipped to the norm
    `clip_norm`.
    """

    frozen: tuple[str, ...] = ()
    local: tuple[str, ...] = ()
    turns: int = 1
    silent_below: float = 0.0
    silent_rounds: int = 3
    clip_norm: float = 0.0

    def __post_init__(self) -> None:
        require_range(self, "turns", 1, 1000)
        require_range(self, "silent_below", 0.0)
        require_range(self, "silent_rounds", 1)
        require_range(self, "clip_norm", 0.0)

    def build(self) -> Stage:
        """The chain of the stages that are on."""
        stages = [
            *([freeze(self.frozen)] if self.frozen else []),
            *([keep_local(self.local)] if self.local else []),
            *([take_turns(self.turns)] if self.turns > 1 else []),
            *([keep_silent(self.silent_below, self.silent_rounds)] if self.silent_below else []),
            *([clip(self.clip_norm)] if self.clip_norm else []),
        ]
        return chain(*stages)


@dataclass(frozen=True)
class AggregationConfig:
    """How updates travel, are merged, and move the adapter, and how that travels back.

    With `first` = `built` nodes build for themselves what nobody has trained yet, and compare its SHA-256; `sent` sends
    its numbers.
    """

    first: str = "sent"
    stages: StagesConfig = field(default_factory=StagesConfig)
    codec: Choice = choice(CODECS, "dense")
    downlink: Choice = choice(CODECS, "dense")
    merge: Choice = choice(MERGES, "fedavg")
    optimizer: Choice = choice(OPTIMIZERS, "sgd")

    def __post_init__(self) -> None:
        require(self.first in FIRST, "first", expected=f"one of {', '.join(FIRST)}", found=self.first)
