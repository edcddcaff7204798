"""What a sink is: a place outside the run folder's journal that gets the figures of each round."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

Record = Mapping[str, Any]


@dataclass(frozen=True)
class About:
    """The run whose figures go into a sink: its folder, its name, its own id `run`, and its `start` record.

    `done` rounds are settled. A resumed run has the id that it began with, and no other run has it. `held` is the last
    round that the sink is known to have from an earlier process of this run; 0 for none.
    """

    root: Path
    name: str
    run: str
    start: Record
    done: int
    held: int


class Sink(NamedTuple):
    """An open sink: it has the rounds up to `held`, takes each later one by `round`, and is closed by `end(how)`.

    `how` is `completed`, `early`, `budget` or `failed`. All three calls come from one thread.
    """

    held: int
    round: Callable[[Record], None]
    end: Callable[[str], None]


class Kind(NamedTuple):
    """A kind of sink: the library that it needs, the extra that brings it, and how it is opened.

    `open(settings, about)` may take its time and may fail as its library does.
    """

    library: str
    extra: str
    open: Callable[[Any, About], Sink]
