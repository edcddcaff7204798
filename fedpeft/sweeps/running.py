"""A sweep from beginning to end: what is not there yet is run, by several workers at once, and all of it is told."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from fedpeft.engines.worker import follow_parent
from fedpeft.errors import FederationError, FedPeftError, sentence
from fedpeft.files import write_atomically
from fedpeft.locks import held
from fedpeft.sweeps.cells import Cell, cells_of
from fedpeft.sweeps.settings import read_plan
from fedpeft.sweeps.tables import table
from fedpeft.sweeps.work import Row, finish, loaded

Tell = Callable[[str], None]
"""Is told each cell's end in one line."""


def run_sweep(path: Path, overrides: Sequence[str], tell: Tell) -> tuple[Path, str]:
    """The sweep's folder and its tables; every cell is finished, and results, tables and plots are written.

    The results are written after each cell, so a sweep that was cut off leaves what it had, and goes on when it is
    started again. A cell that fails does not stop the others.

    Raises:
        ConfigError: the settings cannot be used; nothing was run.
        FederationError: cells failed; the others are in the results.
        RunFolderError: another sweep writes the folder.
    """
    plan = read_plan(path, overrides)
    root, cells = cells_of(plan, overrides)
    for where in {plan.sweep.draw, *(cell.measure for cell in cells)} - {""}:
        loaded(where)
    done: dict[int, Row] = {}
    failed: list[str] = []
    with held(root):
        for at, outcome in _outcomes(cells, plan.sweep.workers):
            if isinstance(outcome, FedPeftError):
                failed.append(f"{cells[at].name}: {outcome}")
                tell(f"failed   {failed[-1]}")
                continue
            done[at] = outcome
            tell(f"{'kept    ' if outcome['cached'] else 'finished'} {cells[at].name} ({len(done)} of {len(cells)})")
            _write(root, [done[at] for at in sorted(done)])
        rows = [done[at] for at in sorted(done)]
        text = table(rows)
        write_atomically(root / "table.md", text.encode())
        if plan.sweep.draw and rows:
            loaded(plan.sweep.draw)(rows, root)
    if failed:
        raise FederationError(
            sentence(
                str(root),
                expected=f"{len(cells)} finished runs",
                found=f"{len(failed)} that failed, the first {failed[0]}",
                remedy="correct that and start the sweep again; what is finished is kept",
            )
        )
    return root, text


def _outcomes(cells: Sequence[Cell], workers: int) -> Iterator[tuple[int, Row | FedPeftError]]:
    """What each cell comes to, as it ends."""
    context = multiprocessing.get_context("spawn")  # a fork would share torch's threads
    pool = ProcessPoolExecutor(min(workers, len(cells)), mp_context=context, initializer=follow_parent)
    waiting: dict[Future[Any], int] = {pool.submit(finish, cell): at for at, cell in enumerate(cells)}
    try:
        for future in as_completed(waiting):
            try:
                yield waiting[future], future.result()
            except BrokenProcessPool as error:
                remedy = "free memory or lower sweep.workers, and start the sweep again; what is finished is kept"
                raise FederationError(
                    sentence("sweep", expected="workers that live", found="one that died", remedy=remedy)
                ) from error
            except FedPeftError as error:
                yield waiting[future], error
    finally:  # not `with`, which on its way out would have what is pending run after all
        pool.shutdown(cancel_futures=True)


def _write(root: Path, rows: Sequence[Row]) -> None:
    write_atomically(root / "results.jsonl", "".join(f"{json.dumps(row)}\n" for row in rows).encode())
