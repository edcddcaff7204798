"""`fedpeft data`: who holds what."""

from __future__ import annotations

from pathlib import Path

import typer

from fedpeft.config import load
from fedpeft.experiment import deal_rows, resolve, task_of
from fedpeft.report.drawing import write_picture
from fedpeft.report.sites import partition_picture
from fedpeft.report.tables import Table, render_plain


def run_data(path: Path, overrides: list[str], picture: Path | None) -> None:
    """Prints each site's rows by label and group, and draws them if `picture` names a file."""
    config = resolve(load(path, overrides))
    dealt, labels = deal_rows(config), list(task_of(config).labels)
    rows = tuple(
        (
            str(site["partition"]),
            str(site["rows"]),
            *(str(site["labels"].get(label, 0)) for label in labels),
            ", ".join(f"{name} {count}" for name, count in site["groups"].items()) or "-",
        )
        for site in dealt.histograms
    )
    typer.echo(render_plain(Table(("site", "rows", *labels, "groups"), rows)))
    report = dealt.report
    typer.echo(
        f"\n{report.rows} rows, {report.repeats_removed} repeats removed; {report.train_rows} to train on, "
        f"{report.test_rows} held out, of which {report.test_overlap:.1%} also stand in training"
    )
    if picture:
        write_picture(partition_picture(dealt.histograms, labels), picture)
        typer.echo(f"drawn in {picture}")
