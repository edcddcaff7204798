"""Lines over rounds: from journal records to points, and from points to a line."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from fedpeft.report import drawing
from fedpeft.report.history import Record

Read = Callable[[Record], float | None]
"""A figure of one round; None where it was not measured."""

Points = Sequence[tuple[float, float]]


def line(axes: Axes, records: Sequence[Record], read: Read, color: str, **look: Any) -> Line2D:
    """The line of a figure over the rounds of `records`, with a gap where it is None."""
    rounds, values = columns(points(records, read))
    return axes.plot(rounds, values, color=color, **{"marker": drawing.dots(rounds), **look})[0]


def points(records: Sequence[Record], read: Read) -> list[tuple[float, float]]:
    """(round, figure) of each record, NaN where it is None."""
    values = [(record["round"], read(record)) for record in records]
    return [(number, math.nan if value is None else value) for number, value in values]


def columns(of: Points) -> tuple[list[float], list[float]]:
    """The points' first and second numbers."""
    return [first for first, _ in of], [second for _, second in of]


def value(key: str) -> Read:
    """What a record says under `key`."""
    return lambda record: record.get(key)


def numbers(records: Sequence[Record]) -> list[int]:
    """The rounds of `records`."""
    return [record["round"] for record in records]


def key(color: str, **look: Any) -> Line2D:
    """A lone piece of line for a legend."""
    return Line2D([], [], color=color, **{"marker": "o", **look})
