"""`fedpeft report`."""

from __future__ import annotations

from pathlib import Path

import typer

from fedpeft.errors import ConfigError, RunFolderError, sentence
from fedpeft.report.page import write_comparison, write_report


def run_report(runs: list[Path], out: Path | None) -> None:
    """The report of one run, or a page that compares several, is written.

    Raises:
        RunFolderError: a folder holds no journal.
        ConfigError: several runs and no `out`.
    """
    for run in runs:
        if not (run / "journal.jsonl").exists():
            raise RunFolderError(
                sentence(str(run), expected="a run folder with journal.jsonl", found="none", remedy="check the path")
            )
    if len(runs) == 1 and out is None:
        typer.echo(f"written: {write_report(runs[0])}")
        return
    if out is None:
        raise ConfigError(
            sentence("--out", expected="a file to write", found="none", remedy="add --out comparison.html")
        )
    typer.echo(f"written: {write_comparison(runs, out)}")
