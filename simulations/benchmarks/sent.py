"""Bytes and accuracy: what methods and codecs save, held against float32 LoRA and against full fine-tuning.

The runs are those of `bytes.toml`; a run's own journal tells its bytes and what full fine-tuning would have sent.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import ticker
from matplotlib.figure import Figure

from fedpeft import journal
from fedpeft.report import drawing
from fedpeft.report.units import human_bytes, percent, times
from fedpeft.sweeps.tables import grouped

PLAIN = ("LoRA", "float32")
"""What all others are held against: FedAvg on LoRA, nothing coded."""

SETTINGS = Path(__file__).with_name("bytes.toml")
WITHIN = 0.005
"""How much less accurate than that runs may be, on average over seeds, for their bytes to count."""

_MARKS = ("o", "s", "^", "D", "v", "P", "X", "*")

HEADING = (
    "| method, codec | bytes up | bytes down | times fewer than float32 LoRA | than full fine-tuning | until it is "
    "accurate enough | accuracy |\n|---|---:|---:|---:|---:|---:|---:|"
)


def sent(folder: Path) -> dict[str, float]:
    """Of a finished run in `folder`: bytes both ways, those of full fine-tuning, and both with accuracy by round."""
    found, total = {}, 0
    for record in journal.read(folder / "journal.jsonl"):
        if record["event"] == "round":
            total += record["bytes_up"] + record["bytes_down"]
            if record["evaluation"]:
                found[f"bytes_{record['round']}"] = float(total)
                found[f"accuracy_{record['round']}"] = record["evaluation"]["accuracy"]
        if record["event"] == "end":
            told = record["traffic"]["bytes"]
            found |= {f"bytes_{key}": told[key]["up"] + told[key]["down"] for key in ("run", "full")}
    return found


class Way:
    """The runs of one method and codec, by seed."""

    def __init__(self, rows: Sequence[Mapping[str, Any]]) -> None:
        self.figures = {row["seed"]: row["figures"] for row in rows}
        self.accuracies = [one["accuracy"] for one in self.figures.values()]
        self.up, self.down = (statistics.mean(one[key] for one in self._all) for key in ("bytes_up", "bytes_down"))

    @property
    def _all(self) -> list[Mapping[str, float]]:
        return list(self.figures.values())

    @property
    def accuracy(self) -> float:
        """The mean over seeds."""
        return float(statistics.mean(self.accuracies))

    @property
    def over_full(self) -> list[float]:
        """How many times what they sent full fine-tuning would have sent."""
        return [one["bytes_full"] / one["bytes_run"] for one in self._all]

    def over(self, plain: Way) -> list[float]:
        """How many times what they sent the runs of `plain` sent, seed by seed."""
        return [plain.figures[seed]["bytes_run"] / one["bytes_run"] for seed, one in self.figures.items()]

    def until(self, accuracy: float) -> float:
        """A run's bytes when seeds were first seen to be so accurate on average; infinite where they never were."""
        seen = self._all
        rounds = sorted(int(key.removeprefix("accuracy_")) for key in seen[0] if key.startswith("accuracy_"))
        reached = (
            statistics.mean(one[f"bytes_{round_}"] for one in seen)
            for round_ in rounds
            if statistics.mean(one[f"accuracy_{round_}"] for one in seen) >= accuracy
        )
        return next(reached, math.inf)


def ways(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[str, ...], Way]:
    """The runs of a sweep, by method and codec."""
    return {variants: Way(found) for variants, found in grouped(rows).items()}


def enough(found: Mapping[tuple[str, ...], Way]) -> float:
    """The accuracy that counts as that of float32 LoRA."""
    return found[PLAIN].accuracy - WITHIN


def best(found: Mapping[tuple[str, ...], Way]) -> tuple[str, ...]:
    """The method and codec of the fewest bytes among those that are accurate enough."""
    return max(
        (name for name, way in found.items() if way.accuracy >= enough(found)),
        key=lambda name: statistics.median(found[name].over(found[PLAIN])),
    )


def front(found: Mapping[tuple[str, ...], Way]) -> list[tuple[str, ...]]:
    """Those that no other beats in bytes and in accuracy, from the fewest bytes on."""
    by_bytes = sorted(found, key=lambda name: (found[name].up + found[name].down, -found[name].accuracy))
    kept: list[tuple[str, ...]] = []
    for name in by_bytes:
        if not kept or found[name].accuracy > found[kept[-1]].accuracy:
            kept.append(name)
    return kept


def lines(found: Mapping[tuple[str, ...], Way]) -> list[str]:
    """A table's row for each method and codec, with the spread of accuracy over seeds."""
    shown = []
    for name, one in found.items():
        until = one.until(enough(found))
        words = (
            ", ".join(name),
            human_bytes(one.up),
            human_bytes(one.down),
            times(statistics.median(one.over(found[PLAIN]))),
            times(statistics.median(one.over_full)),
            human_bytes(until) if math.isfinite(until) else "never",
            f"{percent(one.accuracy)} ({percent(min(one.accuracies))} to {percent(max(one.accuracies))})",
        )
        shown.append(f"| {' | '.join(words)} |")
    return shown


def picture(found: Mapping[tuple[str, ...], Way]) -> Figure:
    """Accuracy against bytes both ways, the range of seeds for each, and a line through those that none beats.

    A method has its colour, a codec its mark; dotted is the accuracy that counts as float32 LoRA's.
    """
    colors, marks = (dict(zip(dict.fromkeys(names), kinds, strict=False)) for names, kinds in _kinds(found))
    with drawing.style():
        figure = Figure(figsize=(1.5 * drawing.WIDTH_INCHES, 3.8), layout="constrained")
        axes = figure.subplots()
        unbeaten = [(found[name].up + found[name].down, found[name].accuracy) for name in front(found)]
        axes.plot(*zip(*unbeaten, strict=True), color="grey", linewidth=0.8)
        axes.axhline(enough(found), color="grey", linestyle=":", linewidth=0.8)
        for (method, codec), one in found.items():
            spread = [[one.accuracy - min(one.accuracies)], [max(one.accuracies) - one.accuracy]]
            drawn: dict[str, Any] = {"color": colors[method], "marker": marks[codec], "markersize": 5, "linewidth": 0.8}
            axes.errorbar([one.up + one.down], [one.accuracy], spread, capsize=0, **drawn)
        axes.set(xscale="log", xlabel="bytes both ways, whole run", title="accuracy on held-out sentences")
        axes.minorticks_off()
        axes.margins(x=0.1)
        axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda number, _: human_bytes(number)))
        drawing.percent_axis(axes)
        keys = {name: drawing.key_mark(color, "o") for name, color in colors.items()}
        keys |= {name: drawing.key_mark("black", mark) for name, mark in marks.items()}
        drawing.legend(figure, list(keys.values()), list(keys), columns=2)
    return figure


def _kinds(found: Mapping[tuple[str, ...], Way]) -> tuple[tuple[Sequence[str], Sequence[str]], ...]:
    """Methods and what tells them apart, and codecs and what does."""
    methods, codecs = zip(*found, strict=True)
    return (methods, drawing.PALETTE), (codecs, _MARKS)
