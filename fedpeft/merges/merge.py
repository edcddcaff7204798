"""What a merge is: a fold over updates, so that they are taken as they arrive and memory stays flat."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from fedpeft.adapters import AdapterSpec, Tensors
from fedpeft.updates import Update

WEIGHTS: Mapping[str, Callable[[Update], float]] = {
    "examples": lambda update: float(update.examples),
    "tokens": lambda update: float(update.tokens),
    "uniform": lambda update: float(update.count),
}
"""How much an update weighs, by the name of the rule."""


class Merged(NamedTuple):
    """The delta that all updates come to, and figures about them for the journal."""

    delta: Tensors
    measures: Mapping[str, float]


class Merge(NamedTuple):
    """`init(spec)`, then `add(state, update)` for each update, then `finish(state)`.

    `weigh(update)` is how much an update counts, before weights are divided by their sum. `reads` is "sum" where
    the rule needs no more than the weighted sum of updates, "each" where it must see each one. `linear`: scaling
    every update scales the result.
    """

    init: Callable[[AdapterSpec], Any]
    add: Callable[[Any, Update], Any]
    finish: Callable[[Any], Merged]
    weigh: Callable[[Update], float]
    reads: str
    linear: bool
