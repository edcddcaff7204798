"""Pictures of the sites: who holds what, and who took part when."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from fedpeft.report import drawing
from fedpeft.report.drawing import FAILED, FAINT, FEDERATION, INK, PALETTE, Plot
from fedpeft.report.history import History, Record

_MOST_KINDS = len(PALETTE) - 1
_MOST_NAMED_SITES = 40
_OTHERS = "others"
_ONE_GROUP_SHARE = 0.95
_MOST_BARS = 200
"""So many sites have bars with room between them; those of more would run together anyhow, in stripes."""


def partition_picture(partitions: Sequence[Record], labels: Sequence[str]) -> Figure:
    """Stacked bars, one a site: its rows by label, and the group that it holds.

    `partitions` are the start line's: `{"partition": 0, "rows": 300, "labels": {...}, "groups": {...}}`. Sites of one
    group stand together under the group's name; where sites hold several groups, a second panel shows the mix.
    Label kinds beyond the nine most frequent are drawn as one, "others"; rows without labels are one kind, "rows".
    """
    labelled = any(partition.get("labels") for partition in partitions)
    if not labelled:
        partitions = [{**partition, "labels": {"rows": partition.get("rows") or 0}} for partition in partitions]
    clusters = _clusters(partitions)
    mixed = clusters is None and any(partition.get("groups") for partition in partitions)
    order = clusters or [("", sorted(partitions, key=lambda partition: int(partition["partition"])))]
    sites = len(partitions) + len(order) - 1
    with drawing.style():
        figure = drawing.new_figure(min(9.0, max(2.4, 1.1 + 0.19 * sites + 0.12 * len(order))))
        panels = figure.subplots(1, 2 if mixed else 1, sharey=True, squeeze=False)[0]
        places = _places(order)
        kinds = _kinds([partition.get("labels") or {} for partition in partitions], labels if labelled else ())
        handles = _bars(panels[0], places, "labels", kinds, PALETTE)
        names = list(kinds)
        _name_sites(panels[0], order, places)
        panels[0].set_xlabel("rows, by label" if labelled else "rows")
        if mixed:
            groups = _kinds([partition.get("groups") or {} for partition in partitions], ())
            handles += _bars(panels[1], places, "groups", groups, PALETTE[::-1])
            names += list(groups)
            panels[1].set_xlabel("rows, by group")
        drawing.legend(figure, handles, names, columns=4 if len(names) <= 4 else 3)
    return figure


def partition_plot(run: History) -> Plot | None:
    """The picture of who holds what, with its caption; None where the start line names no partition."""
    if not run.partitions:
        return None
    figure = partition_picture(run.partitions, run.start.get("labels") or ())
    total = sum(int(partition.get("rows") or 0) for partition in run.partitions)
    sites = "One site holds" if len(run.partitions) == 1 else f"{len(run.partitions)} sites hold"
    labelled = any(partition.get("labels") for partition in run.partitions)
    colours = "; the colours of a bar are its labels" if labelled else ""
    caption = f"{sites} {total:,} training rows{colours}."
    return Plot("partitions", "Who holds what", caption, figure)


def participation_plot(run: History) -> Plot | None:
    """Rounds across, sites down: who was asked and answered, and who failed."""
    if not run.rounds:
        return None
    answered = [
        (record["round"], client["partition"]) for record in run.rounds for client in record.get("clients") or ()
    ]
    failed = [
        (number, failure["partition"]) for number, failure in run.failures if failure.get("partition") is not None
    ]
    known = {int(partition["partition"]) for partition in run.partitions}
    known |= {partition for record in run.rounds for partition in record.get("cohort") or ()}
    known |= {partition for _, partition in answered + failed}
    if not known:
        return None
    rows = {partition: row for row, partition in enumerate(sorted(known))}
    with drawing.style():
        figure = drawing.new_figure(min(7.0, max(2.2, 1.0 + 0.19 * len(rows))))
        axes = figure.subplots()
        handles = _marks(axes, rows, answered, len(run.rounds), marker="s", color=FEDERATION)
        names = ["took part"]
        if failed:
            handles += _marks(axes, rows, failed, len(run.rounds), marker="X", color=FAILED)
            names.append("failed")
        _site_axis(axes, list(rows), list(rows.values()))
        axes.set_ylim(len(rows) - 0.4, -0.6)
        if run.unlike_ranks:
            _rank_axis(axes, rows, run.ranks)
        drawing.rounds_axis(axes, [record["round"] for record in run.rounds])
        drawing.legend(figure, handles, names)
    return Plot("participation", "Who took part", _participation_caption(run, len(rows), len(failed)), figure)


def _participation_caption(run: History, sites: int, failures: int) -> str:
    sizes = sorted({len(record.get("cohort") or ()) for record in run.rounds})
    drawn = str(sizes[0]) if sizes[0] == sizes[-1] else f"{sizes[0]} to {sizes[-1]}"
    failed = {0: "none failed", 1: "one failure"}.get(failures, f"{failures} failures")
    return f"{drawn} of {sites} sites drawn a round; {failed}."


def _marks(
    axes: Axes, rows: Mapping[int, int], points: Sequence[tuple[int, int]], rounds: int, *, marker: str, color: str
) -> list[Any]:
    size = max(1.5, min(7.0, 200 / max(rounds, 1), 7 if len(rows) <= _MOST_NAMED_SITES else 300 / len(rows)))
    numbers = [number for number, _ in points]
    places = [rows[partition] for _, partition in points]
    (line,) = axes.plot(
        numbers, places, linestyle="", marker=marker, color=color, markersize=size, markeredgewidth=0, clip_on=False
    )
    line.set_rasterized(len(points) > drawing.MOST_VECTOR_MARKS)
    return [drawing.key_mark(color, marker)]


def _clusters(partitions: Sequence[Record]) -> list[tuple[str, list[Record]]] | None:
    """Sites under the one group that each holds; None where a site holds none or several."""
    grouped: dict[str, list[Record]] = {}
    for partition in sorted(partitions, key=lambda partition: int(partition["partition"])):
        groups = partition.get("groups") or {}
        total = sum(groups.values())
        name, largest = max(groups.items(), key=lambda item: item[1], default=("", 0))
        if not total or largest < _ONE_GROUP_SHARE * total:
            return None
        grouped.setdefault(name, []).append(partition)
    return sorted(grouped.items()) or None


def _places(order: Sequence[tuple[str, Sequence[Record]]]) -> list[tuple[float, Record]]:
    """Each site's height on the axis: one apart, with room for a line of text above each named group."""
    gap = max(1.2, sum(len(members) for _, members in order) / 28)
    places, height = [], 0.0
    for name, members in order:
        height += gap if name else 0.0
        for partition in members:
            places.append((height, partition))
            height += 1.0
    return places


def _kinds(counts: Sequence[Mapping[str, int]], known: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """What each colour stands for: every kind in the order known, or the most frequent and the others."""
    total: Counter[str] = Counter()
    for count in counts:
        total.update(count)
    names = [*known, *sorted(set(total) - set(known))]
    if len(names) <= _MOST_KINDS:
        return {name: (name,) for name in names}
    frequent = sorted(names, key=lambda name: -total[name])[:_MOST_KINDS]
    kept = {name: (name,) for name in names if name in frequent}
    return {**kept, _OTHERS: tuple(name for name in names if name not in frequent)}


def _bars(
    axes: Axes,
    places: Sequence[tuple[float, Record]],
    key: str,
    kinds: Mapping[str, tuple[str, ...]],
    colors: Sequence[str],
) -> list[Any]:
    heights = [height for height, _ in places]
    lefts, half = [0] * len(places), 0.39 if len(places) <= _MOST_BARS else 0.5
    for names, color in zip(kinds.values(), itertools.cycle(colors)):
        widths = [sum((partition.get(key) or {}).get(name, 0) for name in names) for _, partition in places]
        rights = [left + width for left, width in zip(lefts, widths, strict=True)]
        corners = [
            ((left, at - half), (right, at - half), (right, at + half), (left, at + half))
            for at, left, right in zip(heights, lefts, rights, strict=True)
            if left < right
        ]
        # One artist for all sites: of a thousand bars each, a page would take half a minute.
        axes.add_collection(PolyCollection(corners, facecolor=color, linewidth=0))
        lefts = rights
    axes.set_xlim(0, 1.05 * max([1, *lefts]))
    axes.grid(visible=False, axis="y")
    axes.xaxis.set_major_locator(ticker.MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(lambda number, _position: f"{number:,.0f}")
    return [Patch(color=color) for _, color in zip(kinds, itertools.cycle(colors))]


def _name_sites(
    axes: Axes, order: Sequence[tuple[str, Sequence[Record]]], places: Sequence[tuple[float, Record]]
) -> None:
    _site_axis(axes, [int(partition["partition"]) for _, partition in places], [height for height, _ in places])
    axes.set_ylim((places[-1][0] if places else 0) + 0.6, -0.6)
    first = 0
    for name, members in order:
        if name:
            axes.text(0, places[first][0] - 0.62, drawing.label(name), fontweight="bold", fontsize=8.5, va="bottom")
        first += len(members)


def _site_axis(axes: Axes, partitions: Sequence[int], heights: Sequence[float]) -> None:
    every = _every(len(partitions))
    axes.set_yticks(heights[::every], [str(partition) for partition in partitions[::every]])
    axes.tick_params(axis="y", length=0)
    axes.set_ylabel("site", color=INK if partitions else FAINT)


def _rank_axis(axes: Axes, rows: Mapping[int, int], ranks: Mapping[int, Sequence[int]]) -> None:
    """The rank of each site on the right of its row; where it changed, the first and the last."""
    beside = axes.secondary_yaxis("right")
    every = _every(len(rows))
    told = {rows[partition]: _changed(ranks[partition]) for partition in list(rows)[::every] if partition in ranks}
    beside.set_yticks(list(told), list(told.values()))
    beside.tick_params(axis="y", length=0)
    beside.spines["right"].set_visible(False)
    beside.set_ylabel("rank", color=INK)


def _changed(ranks: Sequence[int]) -> str:
    return str(ranks[0]) if ranks[0] == ranks[-1] else f"{ranks[0]} → {ranks[-1]}"


def _every(sites: int) -> int:
    """One of how many sites is named, so that names do not run together."""
    return max(1, -(-sites // _MOST_NAMED_SITES))
