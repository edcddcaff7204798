"""What the exact merge of adapters of unlike rank costs, and how near it comes, against other ways to merge.

    python -m simulations.benchmarks.merge --plot merge.png

One module of shape (n, n); clients' ranks cycle through 4, 8, 16, 32 and 64, and the server keeps rank 64. Each way
runs in a fresh process, to which adapters come one at a time. To draw them is not timed; the memory counted is what
the merge adds at its peak, with all that it keeps of adapters. Results are held against float64: the mean of products
formed dense, and its truncated SVD. Last comes what the exactness report costs in a round of many modules.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice, product
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import click
import numpy as np
import torch
import typer
from matplotlib import ticker
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from fedpeft.adapters import AdapterSpec, AdapterState, ModuleSpec, factors
from fedpeft.cli import script
from fedpeft.merges import Contribution, Project, as_is, exactness, products, rule, truncated
from fedpeft.merges.projections import Gathered
from fedpeft.randomness import rng
from fedpeft.report import drawing
from fedpeft.report.units import human_bytes, percent, times
from fedpeft.updates import ServerState, Update
from simulations.benchmarks.ways import (
    DENSE,
    EXACT,
    RANKS,
    SERVER_RANK,
    SPECTRA,
    WAYS,
    Cell,
    Outcome,
    Way,
    arriving,
    memory_bytes,
)

SIZES, CLIENTS = (768, 2048, 4096), (10, 100, 1000)
QUICK_SIZES, QUICK_CLIENTS = (64, 128), (10, 40)
MOST_REPEATS, ENOUGH_SECONDS = 7, 3.0
WARM_UP = Cell(640, 24)
"""Merged before anything is measured; great enough to wake each library that a greater one uses."""
ROUND = Cell(384, 6)
"""A round of `MODULES` modules whose exactness report is timed, at these ranks."""
MODULES, ROUND_RANKS = 12, (2, 4, 8, 16)
PROJECTIONS: Mapping[str, Project] = {"exact merge, cut": truncated, "factor mean": as_is}
REPORTS = 15
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
NOTHING = "—"
COLUMNS = ("n", "clients", "way", "seconds", "times faster", "peak memory", "error, cut", "error, mean")
LINE = "{:>5} {:>8}  {:<12}{:>10}{:>14}{:>13}{:>12}{:>13}"


class Figures(NamedTuple):
    """What one way took in one cell: median seconds, peak bytes, and relative distances; NaN where there is none.

    `cut_error` is from the best adapter of the server's rank, `mean_error` that of the mean before it was cut.
    """

    seconds: float
    peak_bytes: float
    cut_error: float
    mean_error: float


class Row(NamedTuple):
    """One way in one cell; without figures it says why."""

    cell: Cell
    way: str
    figures: Figures | None
    why: str = ""


class Goal(NamedTuple):
    """What was to be shown, the figure that was found (NaN where it was not measured), and its bounds."""

    text: str
    found: float
    least: float = -math.inf
    most: float = math.inf

    @property
    def met(self) -> bool:
        """Whether the figure was measured and lies within its bounds."""
        return self.least <= self.found <= self.most


class Peak:
    """The most memory that this process has held since `start`, over what it held then."""

    def start(self) -> None:
        """Counts from here on."""
        # What was freed and kept for reuse would hide as much of what comes.
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
        self._before = memory_bytes(Path("/proc/self/status"), "VmRSS")
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def bytes(self) -> float:
        """Bytes of main memory, and of the GPU's where there is one; NaN where the system does not tell."""
        device = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
        return memory_bytes(Path("/proc/self/status"), "VmHWM") - self._before + device


def merged(way: Way, cell: Cell) -> tuple[float, float, Outcome]:
    """Seconds of one merge, without the time in which adapters are drawn, its peak bytes, and what came of it."""
    peak, seconds = Peak(), 0.0
    peak.start()
    state = way.begin(cell)
    for sent in arriving(cell):
        started = time.perf_counter()
        state = way.add(state, sent)
        seconds += time.perf_counter() - started
    if way.loads:
        peak.start()
        seconds = 0.0
    started = time.perf_counter()
    outcome = way.finish(state)
    return seconds + time.perf_counter() - started, peak.bytes(), outcome


def measure(name: str, cell: Cell, references: Path, enough_seconds: float) -> Figures:
    """The figures of a way in a cell, whose `reference` was written to a folder; for a process that does nothing else.

    It is repeated until all merges together took `enough_seconds`, or `MOST_REPEATS` times.
    """
    way = WAYS[name]
    merged(way, min(cell, WARM_UP))
    first, peak_bytes, outcome = merged(way, cell)
    errors = _errors(outcome, references)
    del outcome
    seconds = [first]
    while len(seconds) < MOST_REPEATS and sum(seconds) < enough_seconds:
        seconds.append(merged(way, cell)[0])
    return Figures(statistics.median(seconds), peak_bytes, *errors)


def reference(cell: Cell, references: Path) -> None:
    """Writes the exact mean, formed dense in float64, and the nearest matrix of the server's rank, to a folder."""
    total, waiting = torch.zeros(cell.size, cell.size, dtype=torch.float64), arriving(cell)
    while chunk := list(islice(waiting, 16)):
        b = torch.cat([sent.share * torch.from_numpy(sent.tensors["layer.B"]).double() for sent in chunk], dim=1)
        a = torch.cat([torch.from_numpy(sent.tensors["layer.A"]).double() for sent in chunk])
        total += b @ a
    np.save(references / "mean.npy", total.numpy())
    u, values, vt = torch.linalg.svd(total, full_matrices=False)
    np.save(references / "cut.npy", ((u[:, :SERVER_RANK] * values[:SERVER_RANK]) @ vt[:SERVER_RANK]).numpy())


def _errors(outcome: Outcome, references: Path) -> tuple[float, float]:
    cut, mean = outcome
    return (
        _distance(cut.b.astype(np.float64) @ cut.a, references / "cut.npy") if cut else math.nan,
        _distance(mean(), references / "mean.npy") if mean else math.nan,
    )


def _distance(found: np.ndarray, path: Path) -> float:
    """The relative distance in the Frobenius norm."""
    wanted = np.load(path)
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def measured(cells: Iterable[Cell], enough_seconds: float) -> Iterator[Row]:
    """Every way in every cell, one after the other."""
    for cell in cells:
        with tempfile.TemporaryDirectory() as folder:
            alone(reference, cell, Path(folder))
            for name, way in WAYS.items():
                why = way.declines(cell)
                try:
                    yield Row(
                        cell, name, None if why else alone(measure, name, cell, Path(folder), enough_seconds), why
                    )
                except BrokenProcessPool:
                    yield Row(cell, name, None, "its process was ended, as for want of memory")


def alone(work: Callable[..., Any], *arguments: Any) -> Any:
    """What `work` returns in a fresh process, forked where it can be from one that has imported and done nothing."""
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    context.set_forkserver_preload(["simulations.benchmarks.ways", "fedpeft.report.drawing"])
    with ProcessPoolExecutor(1, context) as pool:
        return pool.submit(work, *arguments).result()


def report_cost(name: str) -> tuple[float, float]:
    """Median seconds of a round's merge, and of the part of it that only its exactness report needs.

    That is the report and, where the projection does without the exact mean, its fold and its spectra as well.
    """
    state, contributions = _round()
    pairs = [_timed_report(PROJECTIONS[name], state, contributions) for _ in range(REPORTS)]
    return statistics.median(whole for whole, _ in pairs), statistics.median(part for _, part in pairs)


def _timed_report(project: Project, state: ServerState, contributions: Sequence[Contribution]) -> tuple[float, float]:
    modules, before = state.adapter.spec.modules, state.adapter.tensors
    started = time.perf_counter()
    merge = rule("uniform", project)
    fold = merge.init(state, tuple(state.adapter.spec.shapes), ())
    for contribution in contributions:
        fold = merge.add(fold, contribution)
    delta = merge.finish(fold).delta
    whole = time.perf_counter() - started

    started, target = time.perf_counter(), exactness.begin()
    for update, received, weight in ((one.update, one.received, one.weight) for one in contributions):
        target = exactness.add(target, modules, received.tensors, update.delta, weight)
    exact = exactness.means(target)
    folded = time.perf_counter() - started
    projected = project(Gathered(state, modules, delta, exact))

    started = time.perf_counter()
    applied = {module.path: factors(module, before, projected.delta) for module in modules}
    spectra = projected.spectra or {m.path: products.spectrum(exact[m.path], m.rank) for m in modules}
    exactness.report(exact, applied, spectra)
    part = time.perf_counter() - started
    return whole, part if projected.spectra else part + folded


def _round() -> tuple[ServerState, list[Contribution]]:
    """A server that holds zeros, and what its clients send."""
    state = ServerState("benchmark", 0, 0, _zeros(max(ROUND_RANKS)))
    contributions = []
    for client in range(ROUND.clients):
        received, random = _zeros(ROUND_RANKS[client % len(ROUND_RANKS)]), rng(0, "round", client)
        delta = {key: random.standard_normal(shape, dtype=np.float32) for key, shape in received.spec.shapes.items()}
        contributions.append(Contribution(Update(received.spec, delta, 1, 1), received, 1.0))
    return state, contributions


def _zeros(rank: int) -> AdapterState:
    shapes = (("A", (rank, ROUND.size)), ("B", (ROUND.size, rank)))
    modules = tuple(ModuleSpec(f"layer.{at}", "lora", rank, 1.0, shapes) for at in range(MODULES))
    spec = AdapterSpec("benchmark", "lora", modules)
    return AdapterState(spec, {key: np.zeros(shape, np.float32) for key, shape in spec.shapes.items()})


def goals(rows: Sequence[Row]) -> list[Goal]:
    """What this benchmark is to show, against what it found."""
    found = {(row.cell.size, row.cell.clients, row.way): row.figures for row in rows if row.figures}
    unknown, size = Figures(*[math.nan] * 4), max(SIZES)

    def at(clients: int, way: str) -> Figures:
        return found.get((size, clients, way), unknown)

    faster = [
        Goal(
            f"times faster than the dense SVD, {clients} clients, n = {size}",
            at(clients, DENSE).seconds / at(clients, EXACT).seconds,
            least=least,
        )
        for clients, least in ((10, 20.0), (100, 5.0))
    ]
    memory = at(1000, EXACT).peak_bytes / at(100, EXACT).peak_bytes
    errors = [error for row in rows if row.figures and row.way == EXACT for error in row.figures[2:]]
    return [
        *faster,
        Goal(f"peak memory of 1000 clients over that of 100, n = {size}", memory, most=1.2),
        Goal("greatest relative error of the exact merge, cut or not", max(errors, default=math.nan), most=1e-5),
    ]


def goal_line(goal: Goal) -> str:
    """Whether the goal is met, the figure, its bound, and what it is."""
    verdict = "not measured" if math.isnan(goal.found) else "met" if goal.met else "MISSED"
    bound = f"at least {goal.least:g}" if goal.most == math.inf else f"at most {goal.most:g}"
    found = NOTHING if math.isnan(goal.found) else f"{goal.found:.3g}"
    return f"{verdict:<13} {found:<9} {f'({bound})':<16} {goal.text}"


def row_line(row: Row, dense: Row | None) -> str:
    """A row of the table; `dense` is that of the dense SVD in the same cell."""
    start = (str(row.cell.size), str(row.cell.clients), row.way)
    if not row.figures:
        return f"{LINE.format(*start, *[NOTHING] * 5)}  left out: {row.why}"
    seconds, peak_bytes, *errors = row.figures
    ratio = times(dense.figures.seconds / seconds) if dense and dense.figures else NOTHING
    memory = NOTHING if math.isnan(peak_bytes) else human_bytes(peak_bytes)
    shown = [NOTHING if math.isnan(error) else f"{error:.1e}" for error in errors]
    return LINE.format(*start, f"{seconds:.3g} s", ratio, memory, *shown)


def picture(rows: Sequence[Row]) -> Figure:
    """Seconds against clients, a panel for each size, a line for each way."""
    sizes, clients = (sorted({row.cell[at] for row in rows}) for at in (0, 1))
    colors = dict(zip(list(WAYS)[::-1], drawing.PALETTE, strict=False))
    with drawing.style():
        figure = Figure(figsize=(3.1 * len(sizes), 3.6), layout="constrained")
        panels = figure.subplots(1, len(sizes), sharey=True, squeeze=False)[0]
        for size, axes in zip(sizes, panels, strict=True):
            for name, color in colors.items():
                known = [row for row in rows if row.figures and (row.cell.size, row.way) == (size, name)]
                seconds = [row.figures.seconds for row in known if row.figures]
                axes.plot([row.cell.clients for row in known], seconds, color=color, marker="o")
            axes.set(xscale="log", yscale="log", title=f"n = {size}", xlabel="clients", xticks=clients)
            axes.minorticks_off()
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_formatter(ticker.FuncFormatter(lambda number, _: f"{number:g}"))
        panels[0].set_ylabel("seconds of a merge")
        marks = [Line2D([], [], color=color, marker="o") for color in colors.values()]
        drawing.legend(figure, marks, list(colors), columns=min(len(sizes) + 1, 3))
    return figure


def main(
    sizes: Annotated[list[int] | None, typer.Option("--size", help="n; give it again for more.")] = None,
    clients: Annotated[list[int] | None, typer.Option("--clients", help="Give it again for more.")] = None,
    spectrum: Annotated[str, typer.Option(click_type=click.Choice(list(SPECTRA)))] = "decaying",
    quick: Annotated[bool, typer.Option("--quick", help="Small sizes, for a look; goals decide nothing.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Where to write a picture: .png, .svg or .pdf.")] = None,
    threads: Annotated[int, typer.Option(min=1)] = os.cpu_count() or 1,
) -> None:
    """Print what each way to merge costs and how near it comes; exit with 1 where a goal is missed."""
    os.environ.update(dict.fromkeys(THREADS, str(threads)))
    device = "GPU" if torch.cuda.is_available() else "CPU"
    typer.echo(f"{os.cpu_count()} CPUs, {threads} threads, dense SVD on the {device}; spectrum: {spectrum}")
    typer.echo(f"ranks {', '.join(map(str, RANKS))}, cut to {SERVER_RANK}; medians; errors relative, against float64")
    typer.echo(LINE.format(*COLUMNS))
    cells = product(sizes or (QUICK_SIZES if quick else SIZES), clients or (QUICK_CLIENTS if quick else CLIENTS))
    rows: list[Row] = []
    for row in measured((Cell(*cell, spectrum) for cell in cells), 0.0 if quick else ENOUGH_SECONDS):
        rows.append(row)
        typer.echo(row_line(row, next((one for one in rows if (one.cell, one.way) == (row.cell, DENSE)), None)))
    typer.echo(f"\nExactness report, {MODULES} modules of {ROUND.size} × {ROUND.size}, {ROUND.clients} clients")
    for name in PROJECTIONS:
        whole, part = alone(report_cost, name)
        typer.echo(f"{name:<18} merge {1e3 * whole:6.2f} ms   of it for the report {percent(part / whole):>7}")
    typer.echo("")
    found = goals(rows)
    for goal in found:
        typer.echo(goal_line(goal))
    if plot:
        drawing.write_picture(picture(rows), plot)
    if not (quick or all(goal.met for goal in found)):
        raise typer.Exit(1)


if __name__ == "__main__":
    script(main)
