"""Bytes and accuracy: what codecs save, held against float32 LoRA and against full fine-tuning.

The runs are those of `bytes.toml`; a run's own journal tells its bytes and what the same rounds would have sent.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedpeft import journal
from fedpeft.report.units import human_bytes, percent, times
from fedpeft.sweeps.tables import grouped

DENSE = "dense"
SETTINGS = Path(__file__).with_name("bytes.toml")
WITHIN = 0.005
"""How much less accurate a codec's runs may be, on average over seeds, for its bytes to count."""

HEADING = (
    "| codec | bytes up | bytes down | times fewer than float32 LoRA | than full fine-tuning | accuracy |\n"
    "|---|---:|---:|---:|---:|---:|"
)


def sent(folder: Path) -> dict[str, float]:
    """Of a finished run in `folder`: bytes both ways of the same rounds as float32 LoRA and as full fine-tuning."""
    end = next(record for record in journal.read(folder / "journal.jsonl") if record["event"] == "end")
    told = end["traffic"]["bytes"]
    return {f"bytes_{key}": told[key]["up"] + told[key]["down"] for key in ("run", "dense", "full")}


class Codec:
    """The runs of one codec: ratios of bytes by seed, and means."""

    def __init__(self, rows: Sequence[Mapping[str, Any]]) -> None:
        figures = [row["figures"] for row in rows]
        self.accuracies = [one["accuracy"] for one in figures]
        self.over_dense = [one["bytes_dense"] / one["bytes_run"] for one in figures]
        self.over_full = [one["bytes_full"] / one["bytes_run"] for one in figures]
        self.up, self.down = (statistics.mean(one[key] for one in figures) for key in ("bytes_up", "bytes_down"))

    @property
    def accuracy(self) -> float:
        """The mean over seeds."""
        return statistics.mean(self.accuracies)


def codecs(rows: Sequence[Mapping[str, Any]]) -> dict[str, Codec]:
    """The runs of a sweep, by codec."""
    return {variants[-1]: Codec(found) for variants, found in grouped(rows).items()}


def best(found: Mapping[str, Codec]) -> str:
    """The codec of the fewest bytes whose accuracy is within `WITHIN` of that of float32, or better."""
    enough = found[DENSE].accuracy - WITHIN
    return max((name for name in found if found[name].accuracy >= enough), key=lambda name: found[name].over_dense[0])


def lines(found: Mapping[str, Codec]) -> list[str]:
    """A table's row for each codec, with the spread of accuracy over seeds."""
    return [
        f"| {name} | {human_bytes(one.up)} | {human_bytes(one.down)} | {times(statistics.median(one.over_dense))} "
        f"| {times(statistics.median(one.over_full))} "
        f"| {percent(one.accuracy)} ({percent(min(one.accuracies))} to {percent(max(one.accuracies))}) |"
        for name, one in found.items()
    ]
