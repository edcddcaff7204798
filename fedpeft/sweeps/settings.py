"""The `[sweep]` table of a settings file: what is varied, with which seeds, and what is measured of each run.

It stands beside the settings of a run and is no part of them: it never reaches a node.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedpeft.config.fields import require, require_range
from fedpeft.config.parse import build, overlay, read_tree
from fedpeft.errors import ConfigError, sentence

KEY = "sweep"
"""The table's name in the file, and what overrides of it begin with."""

_NAME = re.compile(r"[\w.+-]+")
_WHERE = re.compile(r"[\w.]+:\w+")

Axes = Mapping[str, Mapping[str, tuple[str, ...]]]
"""By an axis' name its variants, and by a variant's name what its runs are told, as `--set` would tell them."""


@dataclass(frozen=True)
class Grid:
    """Every combination of the variants of `axes`, all told `set` too.

    Those in `omit`, each its variants with spaces between, in the order of the axes, are left out.
    `measure` names a function of this project, `module:function`, that is given a finished run's folder and tells
    figures of it; its words are code that runs on this machine, so they are those of whoever starts the sweep.
    """

    name: str = "runs"
    axes: tuple[str, ...] = ()
    set: tuple[str, ...] = ()
    measure: str = ""
    omit: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        require(bool(_NAME.fullmatch(self.name)), "name", expected="letters, digits and . + - _", found=repr(self.name))
        _require_where(self.measure, "measure")


@dataclass(frozen=True)
class Sweep:
    """How the runs are done: `workers` at once, each combination once for each of `seeds` (none: the settings' own).

    `draw` names a function, `module:function`, that is given all rows of results and the sweep's folder.
    """

    workers: int = 1
    seeds: tuple[int, ...] = ()
    draw: str = ""

    def __post_init__(self) -> None:
        require_range(self, "workers", 1)
        _require_where(self.draw, "draw")


@dataclass(frozen=True)
class Plan:
    """A settings file with its `[sweep]` read: the run's tables `base`, and what is done with them."""

    base: Mapping[str, Any]
    sweep: Sweep
    axes: Axes
    grids: tuple[Grid, ...]


def is_sweep(path: Path) -> bool:
    """Whether the settings file has a `[sweep]`.

    Raises:
        ConfigError: no such file, or not TOML.
    """
    return KEY in read_tree(path)


def read_plan(path: Path, overrides: Sequence[str] = ()) -> Plan:
    """The plan in a settings file; of the overrides those of `sweep.` are taken.

    Raises:
        ConfigError: a key or value that is not valid.
    """
    tree = read_tree(path)
    table = tree.pop(KEY, {})
    _require_table(table, KEY)
    own = {key: value for key, value in table.items() if key not in ("axes", "grids")}
    told = [item.removeprefix(f"{KEY}.") for item in overrides if item.startswith(f"{KEY}.")]
    try:
        sweep = build(Sweep, overlay(Sweep, own, told))
    except ConfigError as error:
        raise ConfigError(f"{KEY}.{error}") from None
    axes = _axes(table.get("axes", {}))
    return Plan(tree, sweep, axes, _grids(table.get("grids", [{"axes": list(axes)}]), axes))


def _axes(table: Any) -> Axes:
    _require_table(table, f"{KEY}.axes")
    found = {}
    for axis, variants in table.items():
        _require_table(variants, f"{KEY}.axes.{axis}")
        for name, sets in variants.items():
            place, told = f"{KEY}.axes.{axis}.{name}", isinstance(sets, list) and all(isinstance(x, str) for x in sets)
            _require(told, place, 'a list of settings such as ["rounds=3"]', repr(sets), "write one, or [] for none")
            _require(bool(_NAME.fullmatch(name)), place, "a name of letters, digits and . + - _", repr(name), "rename")
        _require(bool(variants), f"{KEY}.axes.{axis}", "at least one variant", "none", "add one or remove the axis")
        found[axis] = {name: tuple(sets) for name, sets in variants.items()}
    return found


def _grids(tables: Any, axes: Axes) -> tuple[Grid, ...]:
    listed = isinstance(tables, list) and bool(tables)
    _require(listed, f"{KEY}.grids", "tables [[sweep.grids]]", repr(tables), "write at least one")
    found: list[Grid] = []
    for at, table in enumerate(tables):
        _require_table(table, f"{KEY}.grids[{at}]")
        try:
            grid = build(Grid, table)
        except ConfigError as error:
            raise ConfigError(f"{KEY}.grids[{at}].{error}") from None
        for axis in grid.axes:
            _require(
                axis in axes, f"{KEY}.grids[{at}].axes", f"some of {', '.join(axes)}", repr(axis), "name one of them"
            )
        known = [" ".join(names) for names in itertools.product(*(axes[axis] for axis in grid.axes))]
        odd = next((one for one in grid.omit if one not in known), None)
        place = f"{KEY}.grids[{at}].omit"
        _require(odd is None, place, f"combinations such as {known[0]!r}", repr(odd), "correct it, or leave it out")
        _require(len(set(grid.omit)) < len(known), place, "some combination left to run", "none", "shorten the list")
        taken = [other.name for other in found]
        _require(grid.name not in taken, f"{KEY}.grids[{at}].name", "another name", repr(grid.name), "rename it")
        found.append(grid)
    return tuple(found)


def _require_table(value: Any, place: str) -> None:
    _require(isinstance(value, Mapping), place, "a table", repr(value), f"write [{place}]")


def _require(holds: bool, place: str, expected: str, found: str, remedy: str) -> None:
    if not holds:
        raise ConfigError(sentence(place, expected=expected, found=found, remedy=remedy))


def _require_where(name: str, key: str) -> None:
    good = not name or bool(_WHERE.fullmatch(name))
    require(good, key, expected="module:function", found=repr(name), remedy="write for example simulations.mine:draw")
