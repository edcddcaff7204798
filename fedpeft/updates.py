"""What travels from a client to a round, what a client keeps, and everything a round changes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fedpeft.adapters import AdapterSpec, AdapterState, Tensors
from fedpeft.quarantine import Conduct


@dataclass(frozen=True)
class Update:
    """One client's contribution: trained minus received, always.

    `delta` holds the tensors of `spec`. `examples` and `tokens` are what it was trained on; `count` is how
    many clients it stands for, and `share` is multiplied with whatever it weighs. `metrics` are for people, never for
    the algebra. `control` is how the client's control variate moved, where the federation keeps them.
    """

    spec: AdapterSpec
    delta: Tensors
    examples: int
    tokens: int
    count: int = 1
    metrics: Mapping[str, float] = field(default_factory=dict)
    control: Tensors = field(default_factory=dict)
    share: float = 1.0


@dataclass(frozen=True)
class Memory:
    """What one client keeps between rounds: tensors (personal factors, residuals) and plain JSON fields."""

    tensors: Tensors = field(default_factory=dict)
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Drift:
    """How the residual beside the base came about, so that a node which has some of it is sent the rest.

    Columns are appended round by round; `ranks` are how many each module had, in order of path, after each round.
    They were all rewritten after round `epoch`, so that nobody's older columns are of use.
    """

    epoch: int = 0
    ranks: Mapping[int, tuple[int, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Holding:
    """What a node is known to have: the residual as after `round`, and what never changes, at rank `rank`."""

    round: int
    rank: int


@dataclass(frozen=True)
class ServerState:
    """Everything that a round changes; to resume is to load it.

    `run` names this run and no other, `round` counts the rounds that are done. `optimizer` holds the server
    optimiser's tensors, `progress` what early stopping remembers. `drift` and `holdings` (by partition) say who
    has which part of the adapter's residual. `control` is the mean of the clients' control variates. `awaited` are
    those that were asked in the last round and have not answered yet, and the ranks that they were asked for.
    `conduct` says of those who have failed how often and who must not be asked.
    """

    run: str
    round: int
    seed: int
    adapter: AdapterState
    optimizer: Tensors = field(default_factory=dict)
    progress: Mapping[str, float] = field(default_factory=dict)
    drift: Drift = field(default_factory=Drift)
    holdings: Mapping[int, Holding] = field(default_factory=dict)
    control: Tensors = field(default_factory=dict)
    awaited: Mapping[int, int] = field(default_factory=dict)
    conduct: Mapping[int, Conduct] = field(default_factory=dict)
