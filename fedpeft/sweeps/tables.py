"""A sweep's results in Markdown: a table for each grid, a line for each combination, mean ± deviation of the seeds."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The tables of all grids that have results; figures that are no numbers are left out."""
    grids = list(dict.fromkeys(row["grid"] for row in rows))
    return "\n".join(_of_grid(grid, [row for row in rows if row["grid"] == grid]) for grid in grids)


def grouped(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[str, ...], list[Mapping[str, Any]]]:
    """The rows by the names of their variants, those of all seeds together."""
    found: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault(tuple(row["variants"].values()), []).append(row)
    return found


def _of_grid(grid: str, rows: Sequence[Mapping[str, Any]]) -> str:
    numbers = (int, float)
    names = list(dict.fromkeys(key for row in rows for key, x in row["figures"].items() if isinstance(x, numbers)))
    axes = list(rows[0]["variants"])
    lines = [
        f"| {grid}: {', '.join(axes) or 'run'} | seeds | {' | '.join(names)} |",
        f"|---|---:|{'---:|' * len(names)}",
    ]
    for variants, same in grouped(rows).items():
        cells = [_spread([row["figures"][name] for row in same if name in row["figures"]]) for name in names]
        lines.append(f"| {', '.join(variants) or grid} | {len(same)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _spread(values: Sequence[float]) -> str:
    if not values:
        return "–"
    mean = statistics.mean(values)
    if len(values) == 1 or len(set(values)) == 1:
        return f"{mean:.4g}"
    return f"{mean:.4g} ± {statistics.stdev(values):.2g}"
