"""What the laws of `fedpeft.laws` look at, and what a law is."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from fedpeft.adapters import AdapterSpec
from fedpeft.codecs import Codec, dense
from fedpeft.merges import Method
from fedpeft.optimizers import Optimizer
from fedpeft.privacy import Channel, Mechanism
from fedpeft.stages import Stage


class Plan(NamedTuple):
    """All that the laws look at."""

    stage: Stage
    codec: Codec
    method: Method
    optimizer: Optimizer
    spec: AdapterSpec
    ranks: frozenset[int]
    updates: int
    controls: bool
    carries: bool = False
    spare: bool = False
    mechanism: Mechanism | None = None
    channel: Channel | None = None
    downlink: Codec = dense()

    @property
    def rounds(self) -> range:
        """The rounds after which what is frozen repeats."""
        return range(1, self.stage.period + 1)


class Law(NamedTuple):
    """A reason why a plan cannot run: `broken(plan)` is the sentence, or empty."""

    name: str
    broken: Callable[[Plan], str]
