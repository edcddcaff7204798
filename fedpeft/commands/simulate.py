"""`fedpeft simulate`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from fedpeft.bounds import BOUNDS
from fedpeft.config import RunConfig, load
from fedpeft.engines.ray import simulate_on_ray
from fedpeft.engines.workers import local_transport
from fedpeft.errors import ConfigError, sentence
from fedpeft.experiment import resolve
from fedpeft.federate import Watcher, federate
from fedpeft.logs import logging_to
from fedpeft.progress import watching
from fedpeft.report.history import history
from fedpeft.report.tables import render_plain, summary_table
from fedpeft.report.traffic import traffic_words
from fedpeft.runs import RunFolder, folder_for, reopen
from fedpeft.sweeps.running import run_sweep
from fedpeft.sweeps.settings import is_sweep
from fedpeft.wire import Transport

Journal = list[dict[str, Any]]
Engine = Callable[[RunConfig, RunFolder, Callable[[Transport], Journal]], Journal]


def run_simulation(
    path: Path | None, overrides: list[str], *, engine: str, resume: Path | None, bounds: bool, quiet: bool
) -> None:
    """The run is finished and its result printed.

    Raises:
        FedPeftError: what was asked cannot be done, or the run failed.
    """
    if path is not None and resume is None and is_sweep(path):
        _sweep(path, overrides, engine=engine, quiet=quiet)
        return
    config, folder = _start(path, overrides, resume)
    console, form = Console(), config.observation.log_format
    with logging_to(sys.stderr, form, beside_display=True), watching(console, quiet=quiet or form == "json") as watcher:
        run = _runner(config, folder, engine, resume=resume is not None, bounds=bounds, watcher=watcher)
        records = ENGINES[engine](config, folder, run)
    console.print(render_plain(summary_table(records)), highlight=False, soft_wrap=True)
    for said in traffic_words(history(records)):
        console.print(said, highlight=False, soft_wrap=True)
    console.print(
        f"\nEverything is in {folder.root}; open {folder.root / 'report.html'}", highlight=False, soft_wrap=True
    )


def _sweep(path: Path, overrides: list[str], *, engine: str, quiet: bool) -> None:
    """The sweep is finished and its tables printed."""
    if engine != "local":
        remedy = "leave --engine out"
        raise ConfigError(sentence("--engine", expected="local, for a sweep", found=engine, remedy=remedy))
    console, errors = Console(), Console(stderr=True, quiet=quiet)
    root, text = run_sweep(path, overrides, lambda line: errors.print(line, highlight=False, soft_wrap=True))
    console.print(f"{text}\nEverything is in {root}", highlight=False, soft_wrap=True, markup=False)


def _start(path: Path | None, overrides: list[str], resume: Path | None) -> tuple[RunConfig, RunFolder]:
    if (path is None) == (resume is None):
        raise ConfigError(
            sentence(
                "fedpeft simulate",
                expected="either a settings file or --resume RUN",
                found="neither" if path is None else "both",
                remedy="give one of them",
            )
        )
    if resume is not None:
        folder, config = reopen(resume, overrides)
        return config, folder
    config = load(path or Path(), overrides)
    folder = folder_for(config)
    return resolve(replace(config, out=str(folder.root))), folder


def _runner(
    config: RunConfig, folder: RunFolder, engine: str, *, resume: bool, bounds: bool, watcher: Watcher
) -> Callable[[Transport], Journal]:
    def run(transport: Transport) -> Journal:
        return federate(
            config,
            folder,
            transport,
            engine=engine,
            resume=resume,
            bounds=BOUNDS if bounds else (),
            watcher=watcher,
        )

    return run


def _locally(config: RunConfig, folder: RunFolder, run: Callable[[Transport], Journal]) -> Journal:
    with local_transport(config, folder) as transport:
        return run(transport)


def _on_ray(config: RunConfig, folder: RunFolder, run: Callable[[Transport], Journal]) -> Journal:
    del folder
    return simulate_on_ray(config, run)


ENGINES: Mapping[str, Engine] = {"local": _locally, "ray": _on_ray}
"""How a simulation reaches its clients, by the engine's name."""
