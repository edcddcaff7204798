"""How many times faster than Flower's Ray engine with a model for each message, on the same federation.

    python -m simulations.benchmarks.against_flower simulations/demo.toml --rounds 3

Whole processes in turns, as `simulations.benchmarks.sides` runs them.
"""

from __future__ import annotations

import itertools
import json
import statistics
from pathlib import Path
from typing import Annotated

import typer

from fedpeft.cli import script
from fedpeft.config import RunConfig, load
from simulations.benchmarks import sides
from simulations.benchmarks.sides import Took

FLOWER = "Flower, Ray, a model a message"


def flowers(config: RunConfig, folder: Path) -> Took:
    """The same by `simulations.benchmarks.usual_flower`."""
    whole, said = sides.process(
        ["-m", "simulations.benchmarks.usual_flower", str(sides.written(config, folder))], folder
    )
    over = json.loads(said.splitlines()[-1])["rounds"]
    return Took(whole, statistics.median(late - early for early, late in itertools.pairwise(over[1:])))


SIDES = {FLOWER: flowers, sides.OURS: sides.ours}


def main(
    path: Annotated[Path, typer.Argument(help="The federation.")] = Path("simulations/demo.toml"),
    rounds: Annotated[int, typer.Option(min=3)] = 3,
    repeats: Annotated[int, typer.Option(min=1)] = 1,
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE")] = None,
) -> None:
    """Print seconds of both sides."""
    config = sides.task(load(path, set_ or []), rounds)
    typer.echo(sides.HEADING)
    for line in sides.rows(config.name, sides.measure(config, repeats, SIDES)):
        typer.echo(line)


if __name__ == "__main__":
    script(main)
