"""How many client updates a second the in-process engine takes with one worker and with several, beside a bare loop.

    python -m simulations.benchmarks.workers simulations/demo.toml --clients 12 --repeats 3 --set training.steps=2

In each repeat every way trains the same clients from the same requests, in an order that turns with the repeats:
requests are read, adapters installed, trained, encoded, and memories written; workers have been started before. `bare`
is a loop that knows nothing of federations, on one thread and on as many as there are workers: the faster of the two in
each repeat is what the others are held against. All ways have one thread for each worker.
"""

from __future__ import annotations

import contextlib
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer

from fedpeft.cli import script
from fedpeft.config import RunConfig, load, override
from fedpeft.engines.workers import local_transport
from fedpeft.experiment import adapted_model, plan_of, resolve, start_of, strategy_of
from fedpeft.requests import fit_request
from fedpeft.runs import RunFolder
from fedpeft.training import use_threads
from fedpeft.wire import Packet, Transport
from simulations.benchmarks.overhead import bare_round

SHAPES = ((1, 16), (4, 16))
"""Rows of a batch, and tokens that a row is cut at."""

Way = tuple[int, str]
"""How many workers, and whether their clients train together; or how many threads, and `BARE`."""

BARE = "bare"
"""The way of a loop that knows nothing of federations."""


HEADING = (
    "| rows × tokens | workers or threads | cohort | updates a second | over the faster bare loop |\n"
    "|---|---|---|---|---|"
)


def ways_of(workers: int) -> list[Way]:
    """The loop, clients one by one, and clients together; each with one process or thread, and with `workers`."""
    return [(count, how) for count in (1, workers) for how in (BARE, "off", "on")]


def shaped(config: RunConfig, size: int, tokens: int) -> RunConfig:
    """The run with batches of `size` rows, cut at `tokens`."""
    return resolve(override(config, [f"training.batch_size={size}", f"task.{config.task.name}.max_tokens={tokens}"]))


def requests_of(config: RunConfig, clients: int) -> dict[int, Packet]:
    """What the first clients of a run are asked in its first round."""
    strategy, spec = strategy_of(config), adapted_model(config).spec
    state = strategy.init("benchmark", config.seed, start_of(config))
    session = plan_of(config, state.run, spec.digest).session
    return {partition: fit_request(strategy, state, session, partition) for partition in range(clients)}


@contextlib.contextmanager
def transports(config: RunConfig, ways: Sequence[Way], root: Path) -> Iterator[Mapping[Way, Transport]]:
    """The clients of a run, reached in each of the ways."""
    with contextlib.ExitStack() as stack:
        found: dict[Way, Transport] = {}
        for workers, cohort in ways:
            folder = RunFolder(root / f"{workers}-{cohort}")
            folder.root.mkdir()
            told = [f"compute.workers={workers}", f"compute.threads={workers}", f"compute.cohort={cohort}"]
            asked = override(config, [*told, f"out={folder.root}"])
            found[workers, cohort] = stack.enter_context(local_transport(asked, folder))
        yield found


def measure(config: RunConfig, ways: Sequence[Way], clients: int, repeats: int) -> list[dict[Way, float]]:
    """Seconds of each way for each repeat, after one of each for warming up.

    Raises:
        BadParameter: a client failed.
    """
    requests = requests_of(config, clients)
    ours = [way for way in ways if way[1] != BARE]
    with tempfile.TemporaryDirectory() as name, transports(config, ours, Path(name)) as reached:

        def seconds(way: Way) -> float:
            use_threads(way[0] if way[1] == BARE else 1)
            started = time.perf_counter()
            if way[1] == BARE:
                bare_round(config, adapted_model(config), range(clients))
            else:
                replies = [reply for _, reply in reached[way].exchange(requests, 3600.0)]
                if not all(isinstance(reply, Packet) and reply.kind == "update" for reply in replies):
                    raise typer.BadParameter("a client of these settings failed")
            return time.perf_counter() - started

        for way in ways:
            seconds(way)
        turned = [[*ways[at % len(ways) :], *ways[: at % len(ways)]] for at in range(repeats)]
        return [{way: seconds(way) for way in order} for order in turned]


def over_bare(found: Sequence[Mapping[Way, float]], way: Way) -> list[float]:
    """How many times the updates a second of the faster loop this way takes, in each repeat."""
    return [min(seconds for one, seconds in each.items() if one[1] == BARE) / each[way] for each in found]


def rows(config: RunConfig, clients: int, found: Sequence[Mapping[Way, float]]) -> list[str]:
    """A line for each way: what was trained, updates a second, and the bare loop's time over its own, paired."""
    shape = f"{config.training.batch_size} × {getattr(config.task.chosen, 'max_tokens', 0)}"
    lines = []
    for way in found[0]:
        rate = statistics.median(clients / each[way] for each in found)
        lines.append(f"| {shape} | {way[0]} | {way[1]} | {rate:.2f} | {statistics.median(over_bare(found, way)):.2f} |")
    return sorted(lines)


def main(
    path: Annotated[Path, typer.Argument(help="The settings whose clients are trained.")] = Path(
        "simulations/demo.toml"
    ),
    clients: Annotated[int, typer.Option(min=2)] = 12,
    repeats: Annotated[int, typer.Option(min=1)] = 3,
    workers: Annotated[int, typer.Option(min=2, help="How many there are beside one.")] = 2,
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE")] = None,
) -> None:
    """Print a table: client updates a second for batches of two sizes."""
    first = load(path, set_ or [])
    typer.echo(HEADING)
    for size, tokens in SHAPES:
        config = shaped(first, size, tokens)
        for line in rows(config, clients, measure(config, ways_of(workers), clients, repeats)):
            typer.echo(line)


if __name__ == "__main__":
    script(main)
