"""The plots and the table of the privacy frontier, from a sweep's results (see `simulations/privacy/frontier.toml`)."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib import ticker
from matplotlib.figure import Figure

from fedpeft.files import write_atomically
from fedpeft.report import drawing
from simulations.privacy import figures

Rows = Sequence[Mapping[str, Any]]

FREE = "none"
"""The variant of ε that promises nothing; it stands at the right end of the axis."""


class Audit(NamedTuple):
    """What an attack proved of one combination, clients of all seeds together, beside what was accounted for."""

    merge: str
    asked: str
    auc: figures.Interval
    row_auc: float
    proved: float
    accounted: float
    seeds: int


def draw(rows: Rows, root: Path) -> None:
    """Plots and a table stand in the sweep's folder; of grids without results there are none."""
    made = {
        "utility": _over_epsilon(rows, "utility", "accuracy", "accuracy on held-out sentences"),
        "attack": _attack(audits(rows)),
        "epsilon": _proved(audits(rows)),
        "inversion": _inversion(rows),
        "secure": _secure(rows),
    }
    for name, figure in made.items():
        if figure is not None:
            drawing.write_picture(figure, root / f"frontier-{name}.svg")
    write_atomically(root / "frontier.md", table(rows).encode())


def of_grid(rows: Rows, grid: str) -> Rows:
    """The results of one grid."""
    return [row for row in rows if row["grid"] == grid]


def audits(rows: Rows) -> list[Audit]:
    """What is proved of each combination of merge and ε."""
    same: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in of_grid(rows, "audit"):
        same.setdefault((row["variants"]["merge"], row["variants"]["epsilon"]), []).append(row["figures"])
    found = []
    for (merge, asked), of_seeds in same.items():
        inside, outside = (np.concatenate([one[key] for one in of_seeds]) for key in ("scores", "other_scores"))
        proved = figures.epsilon_of_scores(inside, outside, max(one["delta"] for one in of_seeds))
        accounted = max(one.get("epsilon", math.inf) for one in of_seeds)
        row_auc = statistics.mean(one["row_auc"] for one in of_seeds)
        found.append(Audit(merge, asked, figures.auc(inside, outside), row_auc, proved, accounted, len(of_seeds)))
    return found


def table(rows: Rows) -> str:
    """A line for each merge and ε: utility, attack, and what it proves beside the account."""
    lines = [
        "| merge | ε asked | accuracy, % (seeds) | AUC, clients (95 %; seeds) | AUC, rows | ε proved | ε accounted |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    accuracy = _values(rows, "utility", "accuracy")
    for one in audits(rows):
        values = [100 * value for value in accuracy.get((one.merge, one.asked), [])]
        shown = f"{statistics.mean(values):.1f}{_plus_minus(values)} ({len(values)})" if values else "–"
        auc = f"{one.auc.value:.2f} ({one.auc.low:.2f} to {one.auc.high:.2f}; {one.seeds})"
        spent = "∞" if math.isinf(one.accounted) else f"{one.accounted:.2f}"
        lines.append(
            f"| {one.merge} | {one.asked} | {shown} | {auc} | {one.row_auc:.2f} | {one.proved:.2f} | {spent} |"
        )
    return "\n".join([*lines, "", *_other_lines(rows)]) + "\n"


def _other_lines(rows: Rows) -> list[str]:
    lines = ["| inversion | words found, % | words | distinct words over rank |", "|---|---:|---:|---:|"]
    for grid in ("inversion", "inversion-protected"):
        for names, same in _grouped(of_grid(rows, grid)).items():
            found = sum(one["recovered"] * one["words"] for one in same) / sum(one["words"] for one in same)
            load = statistics.mean(one["words_over_rank"] for one in same)
            lines.append(
                f"| {', '.join(names)} | {100 * found:.1f} | {sum(one['words'] for one in same)} | {load:.2f} |"
            )
    lines += ["", "| channel, cohort | bytes up of a client and round | seconds of a round |", "|---|---:|---:|"]
    for names, same in _grouped(of_grid(rows, "costs")).items():
        sent, seconds = (statistics.mean(one[key] for one in same) for key in ("bytes_up_of_a_client", "round_seconds"))
        lines.append(f"| {', '.join(names)} | {sent:,.0f} | {seconds:.2f} |")
    return lines


def _values(rows: Rows, grid: str, key: str) -> dict[tuple[str, str], list[float]]:
    same = _grouped(of_grid(rows, grid))
    return {(names[0], names[1]): [one[key] for one in group] for names, group in same.items()}


def _grouped(rows: Rows) -> dict[tuple[str, ...], list[Mapping[str, Any]]]:
    found: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault(tuple(row["variants"].values()), []).append(row["figures"])
    return found


def _plus_minus(values: Sequence[float]) -> str:
    return f" ± {_deviation(values):.1f}" if len(values) > 1 else ""


def _deviation(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def _places(asked: Sequence[str]) -> list[str]:
    """The variants of ε along the axis, the strictest first."""
    return sorted(dict.fromkeys(asked), key=lambda name: math.inf if name == FREE else float(name))


def _epsilon_axis(axes: Any, places: Sequence[str]) -> None:
    axes.set_xticks(range(len(places)), ["no promise" if name == FREE else f"ε = {name}" for name in places])
    axes.set_xlim(-0.4, len(places) - 0.6)


def _over_epsilon(rows: Rows, grid: str, key: str, title: str) -> Figure | None:
    values = _values(rows, grid, key)
    if not values:
        return None
    places, merges = _places([asked for _, asked in values]), list(dict.fromkeys(merge for merge, _ in values))
    with drawing.style():
        figure = drawing.new_figure()
        axes = figure.add_subplot(title=title)
        handles = []
        for at, merge in enumerate(merges):
            here = [(x, values[merge, name]) for x, name in enumerate(places) if (merge, name) in values]
            shifted = [x + 0.06 * (at - (len(merges) - 1) / 2) for x, _ in here]
            means, spread = [statistics.mean(v) for _, v in here], [_deviation(v) for _, v in here]
            handles.append(axes.errorbar(shifted, means, spread, color=drawing.PALETTE[at], marker="o", capsize=2))
        _epsilon_axis(axes, places)
        drawing.percent_axis(axes)
        drawing.legend(figure, handles, merges, columns=4)
    return figure


def _attack(found: Sequence[Audit]) -> Figure | None:
    if not found:
        return None
    places, merges = _places([one.asked for one in found]), list(dict.fromkeys(one.merge for one in found))
    with drawing.style():
        figure = drawing.new_figure()
        axes = figure.add_subplot(title="who took part, told from the adapter: AUC")
        handles = []
        for at, merge in enumerate(merges):
            own = [one for one in found if one.merge == merge]
            x = [places.index(one.asked) + 0.06 * (at - (len(merges) - 1) / 2) for one in own]
            ends = [[one.auc.value - one.auc.low for one in own], [one.auc.high - one.auc.value for one in own]]
            color = drawing.PALETTE[at]
            handles.append(axes.errorbar(x, [one.auc.value for one in own], ends, color=color, fmt="o", capsize=2))
        axes.axhline(0.5, color=drawing.FAINT, linestyle="--", linewidth=1)
        axes.annotate(
            "a coin's",
            (0.99, 0.5),
            (0, -11),
            ("axes fraction", "data"),
            "offset points",
            color=drawing.FAINT,
            ha="right",
        )
        _epsilon_axis(axes, places)
        axes.set_ylim(0.2, 1.03)
        drawing.legend(figure, handles, merges, columns=4)
    return figure


def _proved(found: Sequence[Audit]) -> Figure | None:
    """What is proved beside what is accounted for: below the line, the account holds."""
    if not found:
        return None
    merges = list(dict.fromkeys(one.merge for one in found))
    finite = [one.accounted for one in found if math.isfinite(one.accounted)]
    end = 1.5 * max([*finite, 1.0])
    with drawing.style():
        figure = drawing.new_figure()
        axes = figure.add_subplot(title="ε that the attack proves (95 %)", xlabel="ε accounted for")
        handles = []
        for at, merge in enumerate(merges):
            own = [one for one in found if one.merge == merge]
            shift = 0.012 * end * (at - (len(merges) - 1) / 2)
            x = [min(one.accounted, 1.25 * max([*finite, 1.0])) + shift for one in own]
            handles += axes.plot(x, [one.proved for one in own], "o", color=drawing.PALETTE[at], markersize=5)
        top = 1.2 * max([one.proved for one in found] + [1.0])
        axes.plot([0, top], [0, top], color=drawing.FAINT, linestyle="--", linewidth=1)
        axes.annotate("proved = accounted", (top, top), (6, -8), textcoords="offset points", color=drawing.FAINT)
        ticks = sorted({round(value, 1) for value in finite})
        axes.set_xticks([0, *ticks, 1.25 * max([*finite, 1.0])], ["0", *(f"{x:g}" for x in ticks), "no promise"])
        axes.set_ylim(-0.05 * top, 1.05 * top)
        drawing.legend(figure, handles, merges, columns=4)
    return figure


def _inversion(rows: Rows) -> Figure | None:
    open_rows = of_grid(rows, "inversion")
    if not open_rows:
        return None
    with drawing.style():
        figure = drawing.new_figure()
        axes = figure.add_subplot(title="words of a batch that are found", xlabel="distinct words over rank, T / r")
        handles, names = [], []
        for at, factors in enumerate(dict.fromkeys(row["variants"]["factors"] for row in open_rows)):
            own = _grouped([row for row in open_rows if row["variants"]["factors"] == factors])
            points = sorted(
                (statistics.mean(one["words_over_rank"] for one in same), _share(same)) for same in own.values()
            )
            handles += axes.plot(*zip(*points, strict=True), "o-", color=drawing.PALETTE[at])
            names.append(factors)
        for at, (variants, same) in enumerate(_grouped(of_grid(rows, "inversion-protected")).items()):
            load, color = statistics.mean(one["words_over_rank"] for one in same), drawing.PALETTE[4 + at]
            handles += axes.plot([load], [_share(same)], "X", color=color, markersize=8)
            names.append(f"LoRA, {variants[0].replace('-', ' ')}")
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
        axes.xaxis.set_minor_formatter(ticker.NullFormatter())
        axes.set_xticks([0.25, 0.5, 1, 2, 4, 8])
        axes.set_ylim(-0.05, 1.05)
        drawing.percent_axis(axes)
        drawing.legend(figure, handles, names)
    return figure


def _share(same: Rows) -> float:
    return float(sum(one["recovered"] * one["words"] for one in same) / sum(one["words"] for one in same))


def _secure(rows: Rows) -> Figure | None:
    own = _grouped(of_grid(rows, "costs"))
    if not own:
        return None
    channels = list(dict.fromkeys(names[0] for names in own))
    cohorts = sorted({int(names[1]) for names in own})
    with drawing.style():
        figure = drawing.new_figure()
        left, right = figure.subplots(1, 2)
        left.set_title("sent by a client, a round")
        right.set_title("a round, seconds")
        handles = []
        for at, channel in enumerate(channels):
            x = [place + 0.36 * (at - 0.5) for place in range(len(cohorts))]
            for axes, key in ((left, "bytes_up_of_a_client"), (right, "round_seconds")):
                heights = [statistics.mean(one[key] for one in own[channel, str(cohort)]) for cohort in cohorts]
                bars = axes.bar(x, heights, 0.32, color=drawing.PALETTE[at])
            handles.append(bars)
        left.yaxis.set_major_formatter(lambda value, _: f"{value / 1000:g} kB")
        for axes in (left, right):
            axes.set_xticks(range(len(cohorts)), [f"{cohort} clients" for cohort in cohorts])
        drawing.legend(figure, handles, channels)
    return figure
