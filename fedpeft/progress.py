"""What a person sees while a run goes on: a live display in a terminal, one plain line a round elsewhere."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from fedpeft.federate import Watcher, silent
from fedpeft.report.units import human_bytes, human_count, human_seconds, percent


@contextlib.contextmanager
def watching(console: Console, *, quiet: bool) -> Iterator[Watcher]:
    """A watcher that shows the run on `console` for as long as the context lasts."""
    if quiet:
        yield silent()
    elif console.is_terminal:
        with _bar(console) as progress:
            yield _Live(console, progress).watcher()
    else:
        yield _Plain(console).watcher()


@dataclass
class _Plain:
    """One line for the start, each round and each bound."""

    console: Console
    rounds: int = 0

    def watcher(self) -> Watcher:
        return Watcher(self.start, self.reply, self.round, self.bound)

    def start(self, record: dict[str, Any], done: int) -> None:
        self.rounds = record["config"]["rounds"]
        self.console.print(_headline(record, done), highlight=False)

    def reply(self, _round: int, _partition: int, _usable: bool) -> None:
        """Single replies are not worth a line."""

    def round(self, record: dict[str, Any]) -> None:
        self.console.print(_round_line(record, self.rounds), highlight=False)

    def bound(self, name: str) -> None:
        self.console.print(f"measuring the bound: {name}", highlight=False)


@dataclass
class _Live(_Plain):
    """The same lines above a bar of clients heard, with the time left."""

    progress: Progress = field(default_factory=Progress)
    cohort: int = 0

    def __init__(self, console: Console, progress: Progress) -> None:
        super().__init__(console)
        self.progress = progress
        self.task = progress.add_task("starting", total=None)

    def start(self, record: dict[str, Any], done: int) -> None:
        super().start(record, done)
        self.cohort = record["config"]["federation.cohort"]
        total = self.rounds * self.cohort
        self.progress.update(self.task, total=total, completed=done * self.cohort, description=f"round {done + 1}")

    def reply(self, round_: int, partition: int, usable: bool) -> None:
        heard = f"round {round_}: site {partition} {'answered' if usable else 'failed'}"
        self.progress.update(self.task, advance=1, description=heard)

    def round(self, record: dict[str, Any]) -> None:
        super().round(record)
        self.progress.update(self.task, completed=record["round"] * self.cohort)

    def bound(self, name: str) -> None:
        self.progress.update(self.task, description=f"bound: {name}", total=None)


def _bar(console: Console) -> Progress:
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", justify="left"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TextColumn("clients, left"),
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
        f"{human_count(adapter['base_parameters'])} parameters, {human_bytes(adapter['bytes'])} a message"
    )


def _round_line(record: dict[str, Any], rounds: int) -> str:
    parts = [f"round {record['round']:>{len(str(rounds))}}/{rounds}", f"training loss {record['loss']:.3f}"]
    if record["evaluation"]:
        parts.append(f"held-out accuracy {percent(record['evaluation']['accuracy'])}")
    parts.append(f"{human_bytes(record['bytes_up'])} up, {human_bytes(record['bytes_down'])} down")
    if record["failures"]:
        first = record["failures"][0]
        parts.append(f"{len(record['failures'])} failed (site {first['partition']}: {first['reason']})")
    return "  ".join([*parts, human_seconds(record["seconds"]["total"])])
