"""What a worker of a sweep does with one cell: the run, to its end, and what is measured of it."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedpeft import journal
from fedpeft.config import RunConfig
from fedpeft.engines.workers import local_transport
from fedpeft.errors import ConfigError, FedPeftError, sentence
from fedpeft.experiment import resolve
from fedpeft.federate import federate
from fedpeft.files import write_atomically
from fedpeft.runs import RunFolder, folder_for, reopen
from fedpeft.sweeps.cells import Cell
from fedpeft.training import use_threads

Row = dict[str, Any]
"""One line of a sweep's results: grid, variants, seed, folder, and `figures` by name."""

MEASURED = "measured.json"
"""What was measured of a run, in its folder, with what measured it."""


def finish(cell: Cell) -> Row:
    """The results of a cell, whose run is finished: it was before, is resumed where it was cut off, or is done now.

    Raises:
        FedPeftError: the run failed, or cannot be measured.
    """
    start = time.perf_counter()
    cached = journal.ended(cell.folder / "journal.jsonl")
    if not cached:
        _run(cell)
    figures = {**told(cell.folder), **(_measured(cell) if cell.measure else {})}
    return {
        "grid": cell.grid,
        "variants": dict(cell.variants),
        "seed": cell.config.seed,
        "folder": cell.folder.name,
        "cached": cached,
        "worker_seconds": round(time.perf_counter() - start, 3),
        "figures": figures,
    }


def told(folder: Path) -> dict[str, Any]:
    """The figures that a run's own journal tells of its end."""
    records = journal.read(folder / "journal.jsonl")
    end = next(record for record in records if record["event"] == "end")
    rounds = [record for record in records if record["event"] == "round"]
    spent = [record["epsilon"] for record in rounds if record.get("epsilon") is not None]
    scores = {key: value for key, value in end["evaluation"].items() if isinstance(value, float)}
    moved = {key: end[key] for key in ("rounds", "seconds", "bytes_up", "bytes_down")}
    return {**scores, **moved, **({"epsilon": spent[-1]} if spent else {})}


def loaded(where: str) -> Callable[..., Any]:
    """The function that `module:function` names, of what is installed or in the current folder.

    Raises:
        ConfigError: there is none.
    """
    module, _, name = where.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Callable[..., Any] = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        remedy = "check its name, and run from the project's folder"
        raise ConfigError(sentence("sweep", expected=f"a function {where}", found=str(error), remedy=remedy)) from error
    return found


def _run(cell: Cell) -> None:
    resume = (cell.folder / "config.toml").exists()
    folder, config = reopen(cell.folder, []) if resume else _fresh(cell.config)
    with local_transport(config, folder) as clients:
        federate(config, folder, clients, engine="local", resume=resume, page=False)


def _fresh(asked: RunConfig) -> tuple[RunFolder, RunConfig]:
    folder = folder_for(asked)
    return folder, resolve(replace(asked, out=str(folder.root)))


def _asked(measure: Callable[..., Any], cell: Cell) -> dict[str, Any]:
    """What somebody's own function says of the run.

    Raises:
        ConfigError: it failed in words of its own.
    """
    try:
        return dict(measure(cell.folder))
    except FedPeftError:
        raise
    except Exception as error:  # one measurement that fails must not end the other runs
        found = f"{type(error).__name__}: {error}"
        raise ConfigError(
            sentence(cell.measure, expected="figures by name", found=found, remedy="correct the function")
        ) from error


def _measured(cell: Cell) -> Mapping[str, Any]:
    """What the cell's measurement tells; done again only where its module is another."""
    measure, path = loaded(cell.measure), cell.folder / MEASURED
    source = Path(sys.modules[measure.__module__].__file__ or "").read_bytes()
    by = {"measure": cell.measure, "source": hashlib.sha256(source).hexdigest()}
    if path.exists():
        kept = json.loads(path.read_text(encoding="utf-8"))
        if {key: kept.get(key) for key in by} == by:
            return dict(kept["figures"])
    use_threads(cell.config.compute.threads)
    figures = _asked(measure, cell)
    write_atomically(path, json.dumps({**by, "figures": figures}).encode())
    return figures
