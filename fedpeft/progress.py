"""What a person sees while a run goes on: a live display in a terminal, one plain line a round elsewhere."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from fedpeft.federate import Watcher, silent
from fedpeft.report.metrics import UNNAMED, metric
from fedpeft.report.units import human_bytes, human_count, human_seconds, relative


@contextlib.contextmanager
def watching(console: Console, *, quiet: bool) -> Iterator[Watcher]:
    """A watcher that shows the run on `console` for as long as the context lasts."""
    if quiet:
        yield silent()
    elif console.is_terminal:
        with _bar(console) as progress:
            yield _live(console, progress)
    else:
        yield _plain(console)


def _plain(console: Console) -> Watcher:
    """One line for the start, each round and each bound; single replies are not worth one."""
    shown = [UNNAMED]

    def start(record: dict[str, Any], done: int) -> None:
        shown[0] = str(record["config"].get("evaluation.metric") or UNNAMED)
        console.print(_headline(record, done), highlight=False, soft_wrap=True)

    return Watcher(
        start=start,
        reply=lambda round_, partition, usable: None,  # noqa: ARG005
        round=lambda record: console.print(_round_line(record, shown[0]), highlight=False, soft_wrap=True),
        bound=lambda name: console.print(f"measuring the bound: {name}", highlight=False, soft_wrap=True),
    )


def _live(console: Console, progress: Progress) -> Watcher:
    """The same lines above a bar of clients heard, with the bytes moved and the time left."""
    plain, task = _plain(console), progress.add_task("starting", total=None, moved="")
    moved = [0]

    def start(record: dict[str, Any], done: int) -> None:
        plain.start(record, done)
        cohort = record["config"]["federation.cohort"]
        total = record["config"]["rounds"] * cohort
        progress.update(task, total=total, completed=done * cohort, description=f"round {done + 1}")

    def reply(round_: int, partition: int, usable: bool) -> None:
        heard = f"round {round_}: site {partition} {'answered' if usable else 'failed'}"
        progress.update(task, advance=1, description=heard)

    def settled(record: dict[str, Any]) -> None:
        plain.round(record)
        moved[0] += record["bytes_up"] + record["bytes_down"]
        progress.update(task, moved=f"{human_bytes(moved[0])} moved")

    def bound(name: str) -> None:
        progress.update(task, description=f"measuring the bound: {name}", total=None)

    return Watcher(start, reply, settled, bound)


def _bar(console: Console) -> Progress:
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", justify="left"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TextColumn("clients  {task.fields[moved]}  left"),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console, transient=True)


def _headline(record: dict[str, Any], done: int) -> str:
    config, adapter = record["config"], record["adapter"]
    resumed = f", going on after round {done}" if done else ""
    return (
        f"{config['name']}: {config['rounds']} rounds, {config['federation.cohort']} of "
        f"{config['federation.clients']} sites each, on the {record['engine']} engine{resumed}; "
        f"{adapter['family']} trains {human_count(adapter['trainable_parameters'])} of "
        f"{human_count(adapter['base_parameters'])} parameters, {human_bytes(adapter['bytes'])} in float32"
    )


def _round_line(record: dict[str, Any], key: str) -> str:
    parts = [f"round {record['round']:>3}", f"training loss {record['loss']:.3f}"]
    if record["evaluation"]:
        told = metric(key)
        parts.append(f"held-out {told.title} {told.text(record['evaluation'].get(key))}")
    error = record.get("merge_error")
    if error is not None and not math.isnan(error):
        parts.append(f"merge error {relative(error)}")
    parts.append(f"{human_bytes(record['bytes_up'])} up, {human_bytes(record['bytes_down'])} down")
    if record["failures"]:
        first = record["failures"][0]
        parts.append(f"{len(record['failures'])} failed (site {first['partition']}: {first['reason']})")
    return "  ".join([*parts, human_seconds(record["seconds"]["total"])])
