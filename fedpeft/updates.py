"""What travels from a client to a round, what a client keeps, and everything a round changes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from fedpeft.adapters import AdapterSpec, AdapterState, Tensors
from fedpeft.quarantine import Conduct


@dataclass(frozen=True)
class Update:
    """One client's contribution: trained minus received, always.

    `delta` holds the tensors of `spec`. `examples` and `tokens` are what it was trained on; `count` is how
    many clients it stands for, and `share` is multiplied with whatever it weighs. `metrics` are for people, never for
    the algebra. `control` is how the client's control variate moved, where the federation keeps them. A `silent`
    update is zero and takes no bytes. `lacks` is about how much of what a low-rank module did is not in `delta`, by
    module path, in Frobenius norms (NaN: nobody knows); a module that it does not name is whole.
    """

    spec: AdapterSpec
    delta: Tensors
    examples: int
    tokens: int
    count: int = 1
    metrics: Mapping[str, float] = field(default_factory=dict)
    control: Tensors = field(default_factory=dict)
    share: float = 1.0
    silent: bool = False
    lacks: Mapping[str, float] = field(default_factory=dict)


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
class Spent:
    """What one private round cost.

    Each of the `clients` took part with probability `rate`, drawn by the sampler of that name; the noise had a
    standard deviation of `noise_multiplier` times what one client could move the released sum by. `groups` take turns.
    Where examples are protected, `clients` are the rows of a site, of which `steps` are made a round.
    """

    round: int
    sampler: str
    clients: int
    rate: float
    noise_multiplier: float
    groups: int = 1
    steps: int = 1

    @property
    def anywhere(self) -> Spent:
        """The same expense, whatever its round."""
        return replace(self, round=0)


@dataclass(frozen=True)
class Privacy:
    """What a private run has spent, and what its mechanism goes on with.

    `history` has one entry for every value that was released, or may have been. `clip_norm` is that of the next round
    (0: the settings'), and `noise` that of rounds before which the next one takes up, by age and tensor.
    """

    history: tuple[Spent, ...] = ()
    clip_norm: float = 0.0
    noise: Tensors = field(default_factory=dict)


@dataclass(frozen=True)
class Sent:
    """The adapter as clients are sent it, where what goes down is coded.

    `tensors` is what those have who were sent every part of it; `delta` is what made it of the round's before, as it
    travels, empty where there is none.
    """

    tensors: Tensors = field(default_factory=dict)
    delta: bytes = b""


@dataclass(frozen=True)
class ServerState:
    """Everything that a round changes; to resume is to load it.

    `run` names this run and no other, `round` counts the rounds that are done. `optimizer` holds the server
    optimiser's tensors, `progress` what early stopping remembers. `drift` and `holdings` (by partition) say who
    has which part of the adapter's residual. `control` is the mean of the clients' control variates. `awaited` are
    those that were asked in the last round and have not answered yet, and the ranks that they were asked for.
    `conduct` says of those who have failed how often and who must not be asked. `privacy` is what has been spent.
    `sent` is the adapter as clients are sent it, empty where that is the adapter itself.
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
    privacy: Privacy = field(default_factory=Privacy)
    sent: Sent = field(default_factory=Sent)
