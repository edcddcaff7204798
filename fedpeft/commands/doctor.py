"""`fedpeft doctor`: whether a node can take part, one line for each thing that it needs."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import socket
import sys
import tempfile
import tomllib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import typer

from fedpeft.assets import cache_folder
from fedpeft.bases import device_of
from fedpeft.commands.checks import FAILED, Check, failed, ok, skipped, warning
from fedpeft.commands.doctor_server import server_checks
from fedpeft.config import RunConfig, choose, load
from fedpeft.config.data import Bundled
from fedpeft.config.node import NodeConfig, load_node
from fedpeft.config.training import ModelConfig
from fedpeft.data.sources import read
from fedpeft.errors import FedPeftError
from fedpeft.experiment import SiteRows, resolve, site_of, task_of
from fedpeft.nodes import (
    followed,
    needed_bytes,
    require_admissible,
    require_protections,
    require_room,
    rows_of,
)
from fedpeft.report.units import human_bytes
from fedpeft.tasks import with_labels
from fedpeft.training import TorchLearner, training_memory_bytes

LEAST_FREE = 2_000_000_000
"""Bytes that a node's cache should have left, for a base and for what is kept between rounds."""

_PROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"
_EXTRAS = {"nf4": "bitsandbytes", "int8": "bitsandbytes", "parquet": "pyarrow", "hub": "datasets", "images": "PIL"}


def run_doctor(path: Path, config: Path | None, overrides: list[str], *, as_json: bool) -> bool:
    """Prints a line for each check, and says whether the node can take part.

    Raises:
        ConfigError: the node's file or the run's settings are not valid.
    """
    node = load_node(path)
    run = load(config, overrides) if config else None
    found: list[Check] = []
    for check in all_checks(node, run):
        found.append(check)
        if not as_json:
            typer.echo(_line(check))
    if as_json:
        typer.echo(json.dumps([check._asdict() for check in found], indent=2, ensure_ascii=False))
    return all(check.outcome != FAILED for check in found)


def all_checks(node: NodeConfig, run: RunConfig | None) -> Iterator[Check]:
    """Every check, those first that need nothing else."""
    yield from library_checks(node)
    yield _device(node)
    yield _cache()
    yield _port(node)
    yield from server_checks(node.server)
    yield from _run_checks(node, run) if run else _files(node)


def _line(check: Check) -> str:
    told = f"{check.outcome:8}{check.name}: {check.found}"
    return f"{told}; {check.remedy}." if check.remedy else told


def library_checks(node: NodeConfig) -> Iterator[Check]:
    """Python and the libraries against what the project asks for, and those that this node's settings need."""
    python, wanted = _requirements()
    version = ".".join(map(str, sys.version_info[:3]))
    if _within(version, python):
        yield ok("python", version)
    else:
        yield failed("python", version, f"install Python {python}")
    lacking = list(_unsatisfied(wanted))
    if lacking:
        yield failed("libraries", ", ".join(lacking), "install what pyproject.toml asks for: pip install fedpeft")
    else:
        yield ok("libraries", f"{len(wanted)} as the project asks for")
    asked = [name for name in (node.model.weights, node.data.name) if name in _EXTRAS]
    missing = [f"{_EXTRAS[name]} (for {name})" for name in asked if importlib.util.find_spec(_EXTRAS[name]) is None]
    if missing:
        yield failed(
            "further libraries", f"{', '.join(missing)} not installed", "install fedpeft[quantised,data,vision]"
        )


def _requirements() -> tuple[str, Sequence[str]]:
    """The versions of Python and of libraries that the project asks for, from its own file or what is installed."""
    if _PROJECT.is_file():
        project = tomllib.loads(_PROJECT.read_text(encoding="utf-8")).get("project", {})
        if project.get("name") == "fedpeft":
            return project["requires-python"], project["dependencies"]
    try:
        metadata = importlib.metadata.metadata("fedpeft")
    except importlib.metadata.PackageNotFoundError:
        return "", ()
    stated = importlib.metadata.requires("fedpeft") or []
    return metadata["Requires-Python"], [item for item in stated if "extra ==" not in item]


def _unsatisfied(requirements: Sequence[str]) -> Iterator[str]:
    for requirement in requirements:
        name, _, versions = re.split(r"(?=([<>=!~]|$))", requirement.split(";")[0], maxsplit=1)
        name = name.split("[")[0].strip()
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield f"{name} not installed"
            continue
        if not _within(found, versions):
            yield f"{name} {found}, not {versions.strip()}"


def _within(version: str, clauses: str) -> bool:
    """Whether `version` meets clauses such as `>=1.41,<1.42`, by their leading numbers."""
    own = _numbers(version)
    for clause in filter(None, (part.strip() for part in clauses.split(","))):
        sign, bound = re.split(r"(?<=[<>=])(?=\s*\d)", clause, maxsplit=1)
        other = _numbers(bound)
        meets = {">=": own >= other, "<": own < other, ">": own > other, "<=": own <= other, "==": own == other}
        if not meets.get(sign.strip(), True):
            return False
    return True


def _numbers(version: str) -> tuple[int, ...]:
    found = tuple(int(part) for part in re.findall(r"\d+", version.split("+")[0])[:3])
    return found + (0,) * (3 - len(found))


def _device(node: NodeConfig) -> Check:
    try:
        return ok("device", device_of(ModelConfig(**node.model.own)))
    except FedPeftError as error:
        return failed("device", str(error).rstrip("."), "set model.device=cpu, or another profile")


def _cache() -> Check:
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            free = shutil.disk_usage(folder).free
    except OSError as error:
        return failed(
            "cache", f"{folder}: {error.strerror}", "name a folder in FEDPEFT_HOME that the node can write into"
        )
    if free < LEAST_FREE:
        return failed("cache", f"{folder} has {human_bytes(free)} free", f"free {human_bytes(LEAST_FREE)}")
    return ok("cache", f"{folder} has {human_bytes(free)} free")


def _port(node: NodeConfig) -> Check:
    try:
        with socket.socket() as own:
            own.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            own.bind(("127.0.0.1", node.port))
    except OSError as error:
        return warning(
            "port", f"{node.port}: {(error.strerror or str(error)).lower()}", "set another port, unless the node runs"
        )
    return ok("port", f"{node.port} is free")


def _files(node: NodeConfig) -> Iterator[Check]:
    """What can be said of data and model without the settings of a run."""
    origin = node.data.chosen
    path = getattr(origin, "path", "")
    if isinstance(origin, Bundled) or not path:
        yield skipped("data", "give the settings of a run (--config) to try it")
    elif "*" not in path and not os.access(path, os.R_OK):
        yield failed("data", f"{path} cannot be read", f"correct data.{node.data.name}.path, or its permissions")
    else:
        yield skipped("data", f"{path} can be read; give the settings of a run (--config) to try its columns")
    if node.model.folder and not (Path(node.model.folder) / "config.json").is_file():
        yield failed("model", f"{node.model.folder} holds no config.json", "correct model.folder")


def _run_checks(node: NodeConfig, run: RunConfig) -> Iterator[Check]:
    """Whether the node admits the run, can use its rows for it, and has the memory."""
    first = (_admitted(node, run), _rows(node, run))
    yield from first
    if any(check.outcome == FAILED for check in first):
        yield skipped("memory", "the run or the rows cannot be used")
    else:
        yield _memory(node, run)


def _admitted(node: NodeConfig, run: RunConfig) -> Check:
    try:
        require_admissible(run, node)
        require_protections(run, node.required)
        followed(run, rows_of(node), node)
    except FedPeftError as error:
        what, _, remedy = str(error).rpartition("; ")
        return failed("run", what, remedy.rstrip("."))
    return ok("run", f"{run.name} is one that this node would take part in")


def _rows(node: NodeConfig, run: RunConfig) -> Check:
    settings = run.task.chosen
    bundled = isinstance(node.data.chosen, Bundled)
    try:
        if bundled:
            followed(run, None, node)
        rows = read(run.data.origin.chosen if bundled else node.data.chosen, settings.roles)
        known = getattr(settings, "labels", None)
        if known != ():
            task_of(run).require(rows, "row")
    except FedPeftError as error:
        what, _, remedy = str(error).rpartition("; ")
        return failed("data", what, remedy.rstrip("."))
    counts = Counter(row.label for row in rows if row.label)
    told = ", ".join(f"{label} {count}" for label, count in counts.most_common(5))
    whose = "the node's share of the run's " if bundled else ""
    unjudged = "; the run names no labels to compare them with" if known == () else ""
    return ok("data", f"{whose}{len(rows)} rows{f' ({told})' if told else ''}{unjudged}")


def _memory(node: NodeConfig, run: RunConfig) -> Check:
    try:
        rows = rows_of(node)
        local = followed(run, rows, node)
        require_room(local.model, node.limits)
        learner = site_of(_labelled(local, rows), node.partition, rows).learner
        if not isinstance(learner, TorchLearner):
            return skipped("memory", "this node trains in a way of its own")
        room = int(node.limits.memory_gigabytes * 1e9) or training_memory_bytes(learner)
        needed = needed_bytes(learner)
    except FedPeftError as error:
        what, _, remedy = str(error).rpartition("; ")
        return failed("memory", what, remedy.rstrip("."))
    told = f"{human_bytes(needed)} of {human_bytes(room)}"
    if needed > room:
        return failed(
            "memory",
            told,
            "lower limits.batch_size, hold the base in fewer bits (see fedpeft plan), or raise the limit",
        )
    return ok("memory", told)


def _labelled(run: RunConfig, rows: SiteRows | None) -> RunConfig:
    """`run` with the labels of the node's own rows, or of the bundled data, where it names none itself."""
    if rows is None:
        return resolve(run)
    task = with_labels(run.task.chosen, rows(run))
    return replace(run, task=choose(run.task.table, run.task.name, **{run.task.name: task}))
