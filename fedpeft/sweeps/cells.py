"""The cells of a sweep: each run's settings, and the folder that it is kept in."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fedpeft.config import RunConfig, from_tree
from fedpeft.config.parse import overlay
from fedpeft.errors import ConfigError
from fedpeft.runs import result_of
from fedpeft.sweeps.settings import KEY, Grid, Plan
from fedpeft.version import VERSION


@dataclass(frozen=True)
class Cell:
    """One run of a sweep: which variant of each axis it is, and all its settings; `config.out` is its folder."""

    grid: str
    variants: tuple[tuple[str, str], ...]
    config: RunConfig
    measure: str = ""

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.config.out)

    @property
    def name(self) -> str:
        """The cell in words, for a line of text."""
        return " ".join([self.grid, *(variant for _, variant in self.variants), f"seed {self.config.seed}"])


def cells_of(plan: Plan, overrides: Sequence[str] = ()) -> tuple[Path, list[Cell]]:
    """The sweep's folder and its cells; what is told last counts: base, grid, axes, seed, overrides.

    All grids of one seed come before those of the next, so what is cut off leaves whole tables of fewer seeds.

    A cell's folder is named for its settings, so what was run with other settings is never taken for it.

    Raises:
        ConfigError: a key or value that is not valid.
    """
    told = [item for item in overrides if not item.startswith(f"{KEY}.")]
    base = from_tree(overlay(RunConfig, plan.base, told))
    root = Path(base.out or Path("runs") / base.name).absolute()
    seeds = plan.sweep.seeds or (base.seed,)
    cells = [
        _cell(plan, root, grid, dict(zip(grid.axes, names, strict=True)), seed, told)
        for seed in seeds
        for grid in plan.grids
        for names in itertools.product(*(plan.axes[axis] for axis in grid.axes))
        if " ".join(names) not in grid.omit
    ]
    return root, cells


def digest_of(config: RunConfig) -> str:
    """SHA-256 of every setting that decides what a run ends with, and of the version that runs it."""
    return hashlib.sha256(json.dumps([VERSION, result_of(config)], sort_keys=True).encode()).hexdigest()


def _cell(plan: Plan, root: Path, grid: Grid, variants: dict[str, str], seed: int, told: Sequence[str]) -> Cell:
    varied = [item for axis, name in variants.items() for item in plan.axes[axis][name]]
    try:
        config = from_tree(overlay(RunConfig, plan.base, [*grid.set, *varied, f"seed={seed}", *told]))
    except ConfigError as error:
        place = " ".join([grid.name, *variants.values()])
        raise type(error)(f"sweep cell {place}: {error}") from None
    name = "-".join([grid.name, *variants.values(), str(config.seed), digest_of(config)[:10]])
    config = replace(config, out=str(root / "cells" / name))
    return Cell(grid.name, tuple(variants.items()), config, grid.measure)
