"""What the merges did, round by round: how exact they were, how much the exact mean held, what the base took up."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from fedpeft.report import drawing, series
from fedpeft.report.drawing import FAINT, FEDERATION, INK, PALETTE, Plot
from fedpeft.report.history import History, Record

_TAIL, _BAND = PALETTE[1], "#c9d8ec"
_LEAST_SCALE = 0.01
"""The error axis reaches at least this far, so that rounding does not look like an error."""


def merge_plots(run: History) -> list[Plot]:
    """Every plot of the merges that the journal has something to show in, in reading order."""
    made = (maker(run) for maker in (merge_error_plot, effective_rank_plot, residual_rank_plot))
    return [plot for plot in made if plot is not None]


def merge_error_plot(run: History) -> Plot | None:
    """How far each round's merge was from the exact mean, in all and for each module, and the mean's tail."""
    measured = [record for record in run.rounds if record.get("merge_error") is not None]
    if not measured:
        return None
    tailed = [record for record in measured if record.get("tail") is not None]
    with drawing.style():
        figure = drawing.new_figure()
        axes = figure.subplots()
        handles = {"all modules": series.key(FEDERATION), "one module": series.key(FAINT, marker="", linewidth=0.8)}
        for module in sorted({name for record in measured for name in record.get("merge_errors") or {}}):
            errors = [(record["round"], (record.get("merge_errors") or {}).get(module)) for record in measured]
            points = [(number, error) for number, error in errors if error is not None]
            axes.plot(*series.columns(points), color=FAINT, linewidth=0.8)
        series.line(axes, measured, series.value("merge_error"), FEDERATION)
        if tailed:
            look = {"linestyle": (0, (3, 2)), "marker": ""}
            series.line(axes, tailed, series.value("tail"), _TAIL, **look)
            handles[f"tail: what no adapter{_of_rank(run)} can hold"] = series.key(_TAIL, **look)
        axes.set_ylim(0, max(axes.get_ylim()[1], _LEAST_SCALE))
        drawing.percent_axis(axes)
        drawing.rounds_axis(axes, series.numbers(measured))
        drawing.legend(figure, list(handles.values()), list(handles), columns=1 if tailed else 2)
    caption = "Distance of the merged product B·A from the mean of the sites' products, over that mean; 0 is exact."
    return Plot("merge-error", "Error of the merge", caption, figure)


def effective_rank_plot(run: History) -> Plot | None:
    """How many directions the exact mean of a module spreads over: the median and the range over modules."""
    spread = [(record["round"], ranks) for record in run.rounds if (ranks := _known(record, "effective_ranks"))]
    if not spread:
        return None
    rounds = [number for number, _ in spread]
    with drawing.style():
        figure = drawing.new_figure()
        axes = figure.subplots()
        lows, highs = ([pick(ranks) for _, ranks in spread] for pick in (min, max))
        band = axes.fill_between(rounds, lows, highs, color=_BAND, linewidth=0)
        if len(rounds) == 1:
            axes.vlines(rounds, lows, highs, color=_BAND, linewidth=6)
        medians = [statistics.median(ranks) for _, ranks in spread]
        (line,) = axes.plot(rounds, medians, color=FEDERATION, marker=drawing.dots(rounds))
        handles = {
            "median of the modules": line,
            "all modules": band,
            **_level(axes, run.server_rank, "adapter's rank"),
        }
        axes.set_ylim(bottom=0)
        drawing.rounds_axis(axes, rounds)
        drawing.legend(figure, list(handles.values()), list(handles))
    caption = "Over how many directions the exact mean spreads (participation ratio of its singular values)."
    return Plot("effective-rank", "Effective rank", caption, figure)


def residual_rank_plot(run: History) -> Plot | None:
    """The greatest rank of what the base has taken up, and the budget for it."""
    measured = [record for record in run.rounds if record.get("residual_rank") is not None]
    if not measured:
        return None
    with drawing.style():
        figure = drawing.new_figure()
        axes = figure.subplots()
        handles = {"the residual": series.line(axes, measured, series.value("residual_rank"), PALETTE[3])}
        handles |= _level(axes, run.budget, "its budget")
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_locator(ticker.MaxNLocator(6, integer=True))
        drawing.rounds_axis(axes, series.numbers(measured))
        drawing.legend(figure, list(handles.values()), list(handles))
    caption = "Greatest rank of what went into the base so far; it travels, and an exported adapter holds it too."
    return Plot("residual-rank", "Rank of the residual", caption, figure)


def _level(axes: Axes, rank: int | None, name: str) -> dict[str, Line2D]:
    """A horizontal line for scale, by what the legend calls it; none where the rank is not known."""
    if not rank:
        return {}
    return {f"{name}: {rank}": axes.axhline(rank, color=INK, linestyle="--", linewidth=1.1)}


def _of_rank(run: History) -> str:
    return f" of rank {run.server_rank}" if run.server_rank else ""


def _known(record: Record, key: str) -> Sequence[float]:
    return [value for value in (record.get(key) or {}).values() if value is not None]
