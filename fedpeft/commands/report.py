"""`fedpeft report`."""

from __future__ import annotations

from pathlib import Path

import typer

from fedpeft.errors import ConfigError, RunFolderError, sentence
from fedpeft.journal import read
from fedpeft.report.drawing import write_picture
from fedpeft.report.page import write_comparison, write_report
from fedpeft.report.plots import plots
from fedpeft.report.tables import Table, comparison_table, render_markdown, summary_table


def run_report(runs: list[Path], out: Path | None, pictures: Path | None, *, markdown: bool) -> None:
    """The report of one run, or a page that compares several, is written; its plots too, where `pictures` says.

    With `markdown` the result's table is printed instead.

    Raises:
        RunFolderError: a folder holds no journal.
        ConfigError: several runs and no `out`.
    """
    for run in runs:
        if not (run / "journal.jsonl").exists():
            raise RunFolderError(
                sentence(str(run), expected="a run folder with journal.jsonl", found="none", remedy="check the path")
            )
    if markdown:
        typer.echo(render_markdown(_table(runs)))
        return
    if len(runs) == 1 and out is None:
        typer.echo(f"written: {write_report(runs[0])}")
        if pictures is not None:
            _write_pictures(runs[0], pictures)
        return
    if out is None:
        raise ConfigError(
            sentence("--out", expected="a file to write", found="none", remedy="add --out comparison.html")
        )
    typer.echo(f"written: {write_comparison(runs, out)}")


def _table(runs: list[Path]) -> Table:
    journals = {str(run): read(run / "journal.jsonl") for run in runs}
    return summary_table(journals[str(runs[0])]) if len(runs) == 1 else comparison_table(journals)


def _write_pictures(run: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for plot in plots(read(run / "journal.jsonl")):
        path = folder / f"{plot.name}.svg"
        write_picture(plot.figure, path)
        typer.echo(f"written: {path}")
