"""Runs of `fedpeft simulate` in processes of their own, that can be stopped and started."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import typer

from fedpeft import journal
from fedpeft.errors import FedPeftError


def run_to_end(settings: Path, folder: Path, sets: Sequence[str], *, bounds: bool) -> None:
    """The run in `folder` is finished; one that was finished is not done again, one that was cut off is resumed.

    Raises:
        FedPeftError: the run failed; the error holds its last words.
    """
    if finished(folder):
        return
    command = [sys.executable, "-m", "fedpeft", "simulate"]
    if (folder / "config.toml").exists():
        command += ["--resume", str(folder)]
    else:
        command += [str(settings), *(word for item in (f"out={folder}", *sets) for word in ("--set", item))]
    command += ["--quiet", "--bounds" if bounds else "--no-bounds"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise FedPeftError(f"{folder}: {done.stderr.strip().splitlines()[-1:]}")
    typer.echo(f"finished: {folder}", err=True)


def finished(folder: Path) -> bool:
    """Whether the run in `folder` has come to its end."""
    path = folder / "journal.jsonl"
    return path.exists() and any(record["event"] == "end" for record in journal.read(path))
