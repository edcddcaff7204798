"""Runs of `fedpeft simulate` in processes of their own, that can be stopped and started."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import typer

from fedpeft import journal
from fedpeft.errors import FedPeftError
from fedpeft.files import write_atomically

_COST = "cost.json"
"""What a run has cost so far, in its folder."""


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
    before = cpu_seconds(folder)
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        words = (process.stderr.read() if process.stderr else "").strip().splitlines()
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if folder.is_dir():
        seconds = before + used.ru_utime + used.ru_stime
        write_atomically(folder / _COST, json.dumps({"cpu_seconds": round(seconds, 3)}).encode())
    if process.returncode:
        raise FedPeftError(f"{folder}: {words[-1:]}")
    typer.echo(f"finished: {folder}", err=True)


def finished(folder: Path) -> bool:
    """Whether the run in `folder` has come to its end."""
    return journal.ended(folder / "journal.jsonl")


def cpu_seconds(folder: Path) -> float:
    """Seconds of processor time that the processes of a run have taken together, start and evaluation with them.

    Unlike seconds on the clock they are near the same on a machine that has other work to do.
    """
    path = folder / _COST
    return float(json.loads(path.read_text(encoding="utf-8"))["cpu_seconds"]) if path.exists() else 0.0
