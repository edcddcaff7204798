"""What a merge is: a fold over contributions, so that they are taken as they arrive."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from fedpeft.adapters import AdapterState, Factors, Tensors
from fedpeft.updates import Privacy, ServerState, Update

WEIGHTS: Mapping[str, Callable[[Update], float]] = {
    "examples": lambda update: float(update.examples),
    "tokens": lambda update: float(update.tokens),
    "uniform": lambda update: float(update.count),
}
"""How much an update weighs, by the name of the rule."""


@dataclass(frozen=True)
class Contribution:
    """One client's update, what it was sent, at its rank, and how much it weighs, before weights are normalised.

    `received` may hold more tensors than the update: those that are not trained, or stay with the client.
    """

    update: Update
    received: AdapterState
    weight: float


@dataclass(frozen=True)
class Merged:
    """What a round comes to.

    `delta` moves the adapter, tensor by tensor, at the server's rank. `residual` is what the base takes up, by
    module path. `measures` are figures for the journal, by name, some by module. `privacy` is what a private merge goes
    on with (None: it is none).
    """

    delta: Tensors
    residual: Mapping[str, Factors] = field(default_factory=dict)
    measures: Mapping[str, float | Mapping[str, float]] = field(default_factory=dict)
    privacy: Privacy | None = None


class Merge(NamedTuple):
    """`init(state, keys, hidden)`, then `add(fold, contribution)` for each, then `finish(fold)`.

    `state` is the server's before the round, `keys` the tensors that clients send, `hidden` those that they train
    and keep. `weigh(update)` is how much an update counts, before weights are divided by their sum. Traits:

    - `reads` is "sum" where the rule needs no more than the weighted sum of updates, "each" where it must see each;
    - `linear`: scaling every update scales the result;
    - `mixed`: clients may be of unlike rank;
    - `gauge` is "kept" where the numbers of one round's adapter mean the same in the next, "free" where the rule
      chooses new factors, so that nothing that remembers earlier deltas can go with it;
    - `whole`: both factors of every low-rank module must be trained and shared;
    - `drifts`: the base takes up what the adapter does not hold;
    - `least` is the fewest updates with which the rule works.
    """

    init: Callable[[ServerState, Collection[str], Collection[str]], Any]
    add: Callable[[Any, Contribution], Any]
    finish: Callable[[Any], Merged]
    weigh: Callable[[Update], float]
    reads: str = "sum"
    linear: bool = True
    mixed: bool = True
    gauge: str = "kept"
    whole: bool = False
    drifts: bool = False
    least: int = 1

    @property
    def mean(self) -> bool:
        """Whether the result is the weighted mean of updates, tensor by tensor."""
        return self.reads == "sum" and self.linear
