"""What ten thousand clients on one machine cost beside a hundred: the greatest memory of the process, and time.

    python -m simulations.benchmarks.scale simulations/demo.toml --clients 10000

Each number of clients is a whole run, its report included, in a process of its own. Who is asked in a round, and the
rows of each client, are as many whatever the number; only how many there are to ask from grows. Rows are some of the
bundled sentiments, with a number before each that tells it from where it comes round again. Memory is the greatest that
the process held from its start to its end. Seconds are those from one round to the next with all that the framework
does in between, the first and the last left out: in the one layers are met for the first time, in the other the adapter
is scored.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, NamedTuple

import typer
from matplotlib import ticker
from matplotlib.figure import Figure

from fedpeft.cli import script
from fedpeft.commands.simulate import ENGINES
from fedpeft.config import RunConfig, load
from fedpeft.data.fields import TEXT_AND_LABEL
from fedpeft.data.sources import read
from fedpeft.experiment import resolve
from fedpeft.federate import federate, silent
from fedpeft.report import drawing
from fedpeft.report.units import human_bytes, human_seconds, times
from fedpeft.runs import RunFolder
from simulations.benchmarks.ways import memory_bytes

FEW, MANY = 100, 10_000
CLIENTS = (10, FEW, 1000, MANY)
COHORT, ROWS, ROUNDS = 10, 4, 8
"""How many clients train in a round, how many rows each of them has, and how many rounds there are."""

SETTINGS = (
    f"rounds={ROUNDS}",
    f"federation.cohort={COHORT}",
    "training.steps=1",
    f"training.batch_size={ROWS}",
    "data.test_fraction=0.1",
    "evaluation.every=0",
    "compute.threads=1",
    "compute.cohort=off",
    "data.partition.by=iid",
    f"data.partition.most_rows={ROWS}",
    "data.most_test_rows=20",
)
_SPARE_ROWS = 200
_LIMIT_SECONDS = 600.0
ROOT = Path(__file__).resolve().parents[2]

HEADING = (
    "| clients | most memory | over that of 100 | a client's update | over that of 100 | whole run |\n"
    "|---:|---:|---:|---:|---:|---:|"
)


class Cost(NamedTuple):
    """What a run took: greatest bytes of its process, seconds of a client's update, and seconds of the whole run."""

    peak_bytes: float
    update_seconds: float
    seconds: float


def rows_of(config: RunConfig, clients: int, path: Path) -> None:
    """`path` holds as many distinct rows as `clients` need, and some to hold out, as JSON lines.

    They are as long for many clients as for few: those of `FEW`, with the number of the time that they come round.
    """
    known = read(config.data.origin.chosen, TEXT_AND_LABEL)[: FEW * ROWS + _SPARE_ROWS]
    with path.open("w", encoding="utf-8") as lines:
        for at in range(clients * ROWS + _SPARE_ROWS):
            row, again = known[at % len(known)], at // len(known)
            lines.write(json.dumps({"text": f"{again} {row.text}", "label": row.label}) + "\n")


def cost_of(settings: Path, told: Sequence[str], folder: Path) -> Cost:
    """What a run of `settings`, with what is `told` besides, takes in this process."""
    started = time.perf_counter()
    settled: list[float] = []
    config = resolve(replace(load(settings, list(told)), out=str(folder)))
    watcher = replace(silent(), round=lambda record: settled.append(time.perf_counter()))  # noqa: ARG005
    run = RunFolder(folder)
    ENGINES["local"](config, run, lambda over: federate(config, run, over, engine="local", watcher=watcher))
    between = [after - before for before, after in itertools.pairwise(settled[:-1])]
    update = statistics.median(between) / config.federation.cohort
    return Cost(memory_bytes(Path("/proc/self/status"), "VmHWM"), update, time.perf_counter() - started)


def alone(settings: Path, clients: int, told: Sequence[str] = ()) -> Cost:
    """What a run of so many clients takes in a process of its own.

    Raises:
        CalledProcessError: the run failed.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows_of(load(settings, list(told)), clients, folder / "rows.jsonl")
        data = ["data.origin=jsonl", f"data.origin.jsonl.path={folder / 'rows.jsonl'}"]
        sets = [*SETTINGS, f"federation.clients={clients}", *data, *told]
        words = ["--one", str(folder / "run"), *(word for item in sets for word in ("--set", item))]
        command = [sys.executable, "-m", "simulations.benchmarks.scale", str(settings), *words]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
        done = subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, text=True, timeout=_LIMIT_SECONDS)
    return Cost(*json.loads(done.stdout.splitlines()[-1]))


def measured(
    settings: Path, clients: Sequence[int], repeats: int, told: Sequence[str] = ()
) -> list[Mapping[int, Cost]]:
    """What each number of clients takes, in each repeat; the order turns with the repeats."""
    turned = [list(clients)[:: -1 if at % 2 else 1] for at in range(repeats)]
    return [{count: alone(settings, count, told) for count in order} for order in turned]


def over(found: Sequence[Mapping[int, Cost]], few: int, many: int, figure: str) -> list[float]:
    """`figure` of `many` clients over that of `few`, in each repeat."""
    return [getattr(each[many], figure) / getattr(each[few], figure) for each in found]


def lines(found: Sequence[Mapping[int, Cost]], few: int = FEW) -> list[str]:
    """A row for each number of clients: medians, and medians of what they are over those of `few`."""
    shown = []
    for count in sorted(found[0]):
        peak, update, seconds = (statistics.median(one) for one in zip(*(each[count] for each in found), strict=True))
        memory, pace = (
            times(statistics.median(over(found, few, count, name))) for name in ("peak_bytes", "update_seconds")
        )
        words = (f"{count:,}", human_bytes(peak), memory, human_seconds(update), pace, human_seconds(seconds))
        shown.append(f"| {' | '.join(words)} |")
    return shown


def picture(found: Sequence[Mapping[int, Cost]]) -> Figure:
    """Greatest memory, and seconds of an update, against clients; a dot for each repeat and a line through medians."""
    counts = sorted(found[0])
    panels = (("peak_bytes", 1e-6, "most memory, MB"), ("update_seconds", 1e3, "a client's update, ms"))
    with drawing.style():
        figure = Figure(figsize=(2 * drawing.WIDTH_INCHES, 2.8), layout="constrained")
        for axes, (name, unit, words) in zip(figure.subplots(1, 2), panels, strict=True):
            values = [[unit * getattr(each[count], name) for each in found] for count in counts]
            axes.plot(counts, [statistics.median(one) for one in values], color=drawing.FEDERATION)
            spread = [(count, value) for count, one in zip(counts, values, strict=True) for value in one]
            axes.plot(*zip(*spread, strict=True), color=drawing.FEDERATION, linestyle="", marker="o")
            axes.set(xscale="log", xlabel="clients", ylabel=words, xticks=counts)
            axes.set_ylim(0, 1.2 * max(value for _, value in spread))
            axes.minorticks_off()
            axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda number, _: f"{number:,.0f}"))
    return figure


def main(
    settings: Annotated[Path, typer.Argument(help="Whose model is trained.")] = Path("simulations/demo.toml"),
    clients: Annotated[list[int] | None, typer.Option("--clients", help="Beside 100; give it again for more.")] = None,
    repeats: Annotated[int, typer.Option(min=1)] = 1,
    plot: Annotated[Path | None, typer.Option(help="Where to write a picture: .png, .svg or .pdf.")] = None,
    one: Annotated[Path | None, typer.Option(help="Only run these settings, into this folder.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE")] = None,
) -> None:
    """Print what runs of few and of many clients take."""
    if one:
        typer.echo(json.dumps(cost_of(settings, set_ or [], one)))
        return
    found = measured(settings, sorted({FEW, *(clients or CLIENTS)}), repeats, set_ or [])
    typer.echo("\n".join([HEADING, *lines(found)]))
    if plot:
        drawing.write_picture(picture(found), plot)


if __name__ == "__main__":
    script(main)
