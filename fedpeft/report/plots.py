"""What happened over the rounds: metric, loss, bytes, drift. Each function gives None where nothing was measured."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import ticker
from matplotlib.axes import Axes

from fedpeft.report import drawing, series
from fedpeft.report.drawing import BOUND_DASHES, FAINT, FEDERATION, INK, PALETTE, Plot
from fedpeft.report.history import History, Record, history
from fedpeft.report.merge_plots import merge_plots
from fedpeft.report.metrics import metric
from fedpeft.report.sites import participation_plot, partition_plot
from fedpeft.report.tables import common_metric
from fedpeft.report.units import human_bytes, times


def plots(records: Sequence[Record]) -> list[Plot]:
    """Every plot that the journal has something to show in, in reading order.

    Raises:
        RunFolderError: the journal does not begin with a start line.
    """
    run = history(records)
    return [*round_plots(run), *merge_plots(run)]


def round_plots(run: History) -> list[Plot]:
    """What happened round by round and site by site."""
    makers = (
        metric_plot,
        group_metric_plot,
        loss_plot,
        drift_plot,
        round_bytes_plot,
        total_bytes_plot,
        partition_plot,
        participation_plot,
    )
    return [plot for plot in (maker(run) for maker in makers) if plot is not None]


def metric_plot(run: History) -> Plot | None:
    """The run's metric on held-out rows after each evaluated round, the bounds as horizontal lines."""
    on_sites = [record for record in run.rounds if record.get("client_evaluation")]
    if not run.evaluated and not on_sites:
        return None
    told = metric(run.metric)
    with drawing.style():
        figure = drawing.new_figure()
        axes = figure.subplots()
        handles = {}
        if run.evaluated:
            handles["federation"] = series.line(axes, run.evaluated, _evaluated(run.metric), FEDERATION)
        if on_sites:
            name = "federation, on the sites' own rows"
            handles[name] = series.line(
                axes, on_sites, _evaluated(run.metric, "client_evaluation"), FAINT, linestyle=":"
            )
        for row, dashes in zip(run.bounds, itertools.cycle(BOUND_DASHES)):
            score = (row.get("evaluation") or {}).get(run.metric)
            if score is not None:
                bound = axes.axhline(score, color=INK, linestyle=dashes, linewidth=1.1)
                handles[f"{row.get('name')}: {told.text(score)}"] = bound
        _metric_axis(axes, run.metric)
        drawing.rounds_axis(axes, series.numbers(run.rounds))
        drawing.legend(figure, list(handles.values()), list(handles), columns=1)
    bounds = "; broken lines: the bounds, which no round changes" if run.bounds else ""
    return Plot(_name(run.metric), told.heading, f"{told.caption} after each round{bounds}.", figure)


def group_metric_plot(run: History) -> Plot | None:
    """The run's metric on the held-out rows of each group after each evaluated round."""
    seen = {name for record in run.evaluated for name in record["evaluation"].get("groups") or {}}
    if not seen:
        return None
    with drawing.style():
        figure = drawing.new_figure()
        axes = figure.subplots()
        handles = {
            name: series.line(axes, run.evaluated, _of_group(name, run.metric), color)
            for name, color in zip(sorted(seen), itertools.cycle(PALETTE))
        }
        handles["all rows"] = series.line(axes, run.evaluated, _evaluated(run.metric), FAINT, linestyle="--", marker="")
        _metric_axis(axes, run.metric)
        drawing.rounds_axis(axes, series.numbers(run.rounds))
        drawing.legend(figure, list(handles.values()), list(handles), columns=3)
    caption = "The same model on the held-out rows of each group; a spread means that it serves some better."
    return Plot(f"group-{_name(run.metric)}", f"{metric(run.metric).heading} by group", caption, figure)


def loss_plot(run: History) -> Plot | None:
    """The cohort's training loss each round, and the held-out loss."""
    trained = [record for record in run.rounds if record.get("loss") is not None]
    if not trained and not run.evaluated:
        return None
    with drawing.style():
        figure = drawing.new_figure()
        axes = figure.subplots()
        handles = {}
        if trained:
            handles["training, the cohort"] = series.line(axes, trained, series.value("loss"), PALETTE[1])
        if run.evaluated:
            handles["held-out rows"] = series.line(axes, run.evaluated, _evaluated("loss"), FEDERATION)
        drawing.rounds_axis(axes, series.numbers(run.rounds))
        drawing.legend(figure, list(handles.values()), list(handles))
    caption = "Training loss is the weighted mean of the sites that took part, so it moves with who was drawn."
    return Plot("loss", "Loss", caption, figure)


def drift_plot(run: History) -> Plot | None:
    """Norms of the clients' deltas and of their mean, and how far the clients lie from it."""
    if not run.rounds:
        return None
    with drawing.style():
        figure = drawing.new_figure(3.6)
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
        dots = [(record["round"], norm) for record in run.rounds for norm in _client_norms(record)]
        (cloud,) = above.plot(*series.columns(dots), "o", color=FAINT, alpha=0.7, markersize=3, markeredgewidth=0)
        cloud.set_rasterized(len(dots) > drawing.MOST_VECTOR_MARKS)
        series.line(above, run.rounds, series.value("update_norm"), FEDERATION)
        above.set_ylim(bottom=0)
        above.set_title("norm of the update")
        series.line(below, run.rounds, series.value("drift"), PALETTE[3])
        below.set_ylim(bottom=0)
        below.set_title("drift (distance from the mean ÷ norm of the mean)")
        drawing.rounds_axis(below, series.numbers(run.rounds))
        handles = [series.key(FEDERATION), drawing.key_mark(FAINT, "o")]
        drawing.legend(figure, handles, ["merged update", "one site's update"])
    caption = "Above 1, the sites pull apart more than they pull together."
    return Plot("drift", "Client drift", caption, figure)


def round_bytes_plot(run: History) -> Plot | None:
    """Bytes up and down in each round against sending the full model."""
    return _bytes_plot(
        run, "bytes", "Bytes per round", "What a round sent, on a log scale", lambda sizes: list(map(float, sizes))
    )


def total_bytes_plot(run: History) -> Plot | None:
    """Bytes up and down since the first round against sending the full model."""
    less = f": {times(run.ratio)} less than the full model" if run.ratio else ""
    caption = f"All that was sent so far, on a log scale{less}"
    return _bytes_plot(run, "bytes-total", "Bytes in total", caption, lambda sizes: list(itertools.accumulate(sizes)))


def comparison_plots(runs: Mapping[str, Sequence[Record]]) -> list[Plot]:
    """The first run's metric over rounds and over bytes, one line a run.

    Raises:
        RunFolderError: a journal does not begin with a start line.
    """
    told = {name: history(records) for name, records in runs.items()}
    told = {name: run for name, run in told.items() if run.evaluated}
    if not told:
        return []
    key = common_metric(told)
    shown = metric(key)
    by_round = {name: series.points(run.evaluated, _evaluated(key)) for name, run in told.items()}
    by_bytes = {name: _over_bytes(run, key) for name, run in told.items()}
    caption = f"{shown.caption}, on held-out rows after each round."
    return [
        _comparison(key, _name(key), f"{shown.heading} over rounds", caption, by_round),
        _comparison(
            key,
            f"{_name(key)}-bytes",
            f"{shown.heading} over bytes",
            "The same curves against all bytes sent.",
            by_bytes,
        ),
    ]


def _comparison(
    key: str, name: str, title: str, caption: str, lines: Mapping[str, Sequence[tuple[float, float]]]
) -> Plot:
    with drawing.style():
        figure = drawing.new_figure(3.4)
        axes = figure.subplots()
        dashes = itertools.chain.from_iterable(itertools.repeat(kind, len(PALETTE)) for kind in ("-", "--", ":", "-."))
        handles = [
            axes.plot(*series.columns(points), color=color, linestyle=dash, marker=drawing.dots(points))[0]
            for points, color, dash in zip(lines.values(), itertools.cycle(PALETTE), itertools.cycle(dashes))
        ]
        _metric_axis(axes, key)
        if name == _name(key):
            drawing.rounds_axis(axes, [int(number) for points in lines.values() for number, _ in points])
        else:
            axes.xaxis.set_major_locator(ticker.MaxNLocator(5))
            axes.xaxis.set_major_formatter(lambda size, _position: human_bytes(size))
            axes.set_xlabel("bytes up and down")
        drawing.legend(figure, handles, list(lines))
    return Plot(name, title, caption, figure)


def _bytes_plot(run: History, name: str, title: str, caption: str, gather: Any) -> Plot | None:
    if not any(record.get("bytes_up") or record.get("bytes_down") for record in run.rounds):
        return None
    numbers = series.numbers(run.rounds)
    lines = {
        "down (server to sites)": ("bytes_down", "#9fc9b8", 3.6),
        "up (sites to server)": ("bytes_up", FEDERATION, 1.6),
    }
    with drawing.style():
        figure = drawing.new_figure()
        axes = figure.subplots()
        handles = {}
        for told, (key, color, width) in lines.items():
            sizes = gather([record.get(key) or 0 for record in run.rounds])
            handles[told] = axes.plot(
                numbers, _positive(sizes), color=color, linewidth=width, marker=drawing.dots(numbers)
            )[0]
        full = gather([run.full_model_bytes_of(record) or 0 for record in run.rounds])
        if any(full):
            handles["the full model, both ways"] = axes.plot(numbers, _positive(full), color=INK, linestyle="--")[0]
        drawing.bytes_axis(axes)
        drawing.rounds_axis(axes, numbers)
        drawing.legend(figure, list(handles.values()), list(handles))
    return Plot(name, title, f"{caption}.", figure)


def _evaluated(key: str, where: str = "evaluation") -> Any:
    return lambda record: record[where].get(key)


def _of_group(name: str, key: str) -> Any:
    return lambda record: ((record["evaluation"].get("groups") or {}).get(name) or {}).get(key)


def _over_bytes(run: History, key: str) -> list[tuple[float, float]]:
    sent = itertools.accumulate(
        (record.get("bytes_up") or 0) + (record.get("bytes_down") or 0) for record in run.rounds
    )
    totals = dict(zip(series.numbers(run.rounds), sent, strict=True))
    return [(totals[int(number)], value) for number, value in series.points(run.evaluated, _evaluated(key))]


def _name(key: str) -> str:
    """The name of the metric's plot; the losses have one of their own."""
    return "held-out-loss" if key == "loss" else key.replace("_", "-")


def _metric_axis(axes: Axes, key: str) -> None:
    if metric(key).share:
        drawing.percent_axis(axes)


def _client_norms(record: Record) -> list[float]:
    norms = [client.get("update_norm") for client in record.get("clients") or ()]
    return [norm for norm in norms if norm is not None]


def _positive(sizes: Sequence[float]) -> list[float]:
    return [size if size > 0 else math.nan for size in sizes]
