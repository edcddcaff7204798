"""`fedpeft merge`."""

from __future__ import annotations

from pathlib import Path

import typer

from fedpeft.errors import PlanError, sentence
from fedpeft.merging import MergedAdapter, merge


def run_merge(folders: list[Path], method: str, weights: str, rank: int, missing: str, out: Path) -> None:
    """`out` holds one adapter made of those in `folders`; says how far it is from their exact mean.

    Raises:
        FedPeftError: an adapter cannot be read, the method cannot serve them, or `out` is in the way.
    """
    merged = merge(folders, method, weights=_numbers(weights), rank=rank, missing=missing)
    merged.write(out)
    for line in _lines(merged, method, out):
        typer.echo(line)


def _numbers(text: str) -> list[float]:
    try:
        return [float(item) for item in text.split(",")] if text else []
    except ValueError as error:
        remedy = "write them like 3,1,2"
        raise PlanError(sentence("--weights", expected="numbers", found=repr(text), remedy=remedy)) from error


def _lines(merged: MergedAdapter, method: str, out: Path) -> list[str]:
    """What a user wants to know of a merge."""
    sources = [
        f"  {share:6.1%}  {source.folder}  (rank {_ranks([m.rank for m in source.state.spec.modules if m.rank])})"
        for source, share in zip(merged.sources, merged.shares, strict=True)
    ]
    ranks = [module.rank for module in merged.state.spec.modules if module.kind == "lora"]
    report = merged.report
    worst = max(report.errors, key=lambda path: report.errors[path])
    return [
        f"merged by {method}:",
        *sources,
        f"written: {out}  (rank {_ranks(ranks)}, {merged.state.spec.parameters:,} parameters)",
        f"error against the exact mean: {report.error:.1e}  (largest {report.errors[worst]:.1e}, {worst})",
    ]


def _ranks(ranks: list[int]) -> str:
    low, high = min(ranks, default=0), max(ranks, default=0)
    return str(low) if low == high else f"{low} to {high}"
