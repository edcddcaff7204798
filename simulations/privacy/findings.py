"""Findings: what an attack came to, as lines of JSON that a report can read, and as a table."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from fedpeft import journal
from fedpeft.config import RunConfig, to_flat
from fedpeft.errors import ConfigError, sentence
from fedpeft.locks import held
from fedpeft.report.page import write_report
from fedpeft.runs import RunFolder, reopen, writing
from simulations.privacy.figures import Interval


@dataclass(frozen=True)
class Finding:
    """One figure of one attack.

    `adversary` is what the attack was given: the name of its view, and what else it knew. The figure lies between `low`
    and `high` at the confidence of `simulations.privacy.figures`; `n` is how many cases it was counted on.
    """

    attack: str
    adversary: str
    metric: str
    value: float
    low: float
    high: float
    n: int


def found(attack: str, adversary: str, metric: str, interval: Interval, n: int) -> Finding:
    """The finding of a figure with its interval."""
    return Finding(attack, adversary, metric, *interval, n)


def exactly(attack: str, adversary: str, metric: str, value: float, n: int) -> Finding:
    """The finding of a figure that is what it is: a count, or a bound that holds by itself."""
    return Finding(attack, adversary, metric, value, value, value, n)


def write(path: Path, findings: Iterable[Finding], context: Mapping[str, Any]) -> None:
    """The file ends with a record `{"event": "attack", ...}` of each finding; `context` is said in each of them.

    The lines are those of a journal: `fedpeft.journal.read` reads them.

    Raises:
        OSError: the disk is full or not writable.
    """
    for finding in findings:
        journal.append(path, {"event": "attack", **context, **asdict(finding)})


def require_same(config: RunConfig, root: Path) -> RunFolder:
    """The run folder `root`, whose run has the settings of `config` in all but its seed and what cannot change it.

    Raises:
        RunFolderError: there is no run.
        ConfigError: it is another one, so what is found of `config` does not hold of it.
    """
    folder, stored = reopen(root, [])
    differing = unlike(config, stored)
    if differing:
        remedy = f"give the settings of {folder.config}"
        expected = f"the settings of the run in {root}"
        found_ = f"another {', '.join(differing)}"
        raise ConfigError(sentence("--report", expected=expected, found=found_, remedy=remedy))
    return folder


def unlike(one: RunConfig, other: RunConfig) -> list[str]:
    """The settings in which two runs differ, but for their seeds and what cannot change what is found of them."""
    ours, theirs = to_flat(one), to_flat(other)
    return sorted(key for key in theirs | ours if theirs.get(key) != ours.get(key) and not key.startswith(_FREE))


_FREE = ("out", "name", "seed", "compute.", "observation.", "evaluation.", "model.device")
"""What may differ between the run that was attacked and the one whose report tells of it."""


def report(folder: RunFolder, findings: Iterable[Finding], context: Mapping[str, Any]) -> None:
    """The run's journal has a record `{"event": "finding", ...}` of each finding, and its report shows them.

    Raises:
        RunFolderError: another process writes the folder, or its disk is full.
    """
    with held(folder.root), writing(folder.journal):
        for finding in findings:
            journal.append(folder.journal, {"event": "finding", **context, **asdict(finding)})
        write_report(folder.root)


def read(path: Path) -> list[Finding]:
    """The findings in a file.

    Raises:
        RunFolderError: there is no such file, or it is corrupt.
    """
    return [_from_record(record) for record in journal.read(path) if record["event"] == "attack"]


def _from_record(record: Mapping[str, Any]) -> Finding:
    """The finding that a record tells; a figure that was none is NaN."""
    pairs = [(field.name, record[field.name]) for field in fields(Finding)]
    values: dict[str, Any] = {name: math.nan if value is None else value for name, value in pairs}
    return Finding(**values)


def table(findings: Sequence[Finding]) -> str:
    """The findings in Markdown, in their order."""
    lines = ["| attack | adversary has | metric | value | between | n |", "|---|---|---|---:|---:|---:|"]
    lines += [
        f"| {one.attack} | {one.adversary} | {one.metric} | {_number(one.value)} | {_between(one)} | {one.n} |"
        for one in findings
    ]
    return "\n".join(lines) + "\n"


def _between(one: Finding) -> str:
    return "–" if one.low == one.high or math.isnan(one.low) else f"{_number(one.low)} to {_number(one.high)}"


def _number(value: float) -> str:
    return (
        "–"
        if math.isnan(value)
        else f"{value:.4g}"
        if value < 0.1
        else f"{value:.3f}"
        if value < 100
        else f"{value:.0f}"
    )
