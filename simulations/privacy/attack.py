"""Runs a federation, attacks what an adversary saw of it, and says what came of that.

    python -m simulations.privacy.attack inversion simulations/demo.toml --set adapter.lora.layers=0,1
    python -m simulations.privacy.attack membership simulations/privacy/membership.toml --attack seeds=3

The run is the one that `fedpeft simulate` would do, in this process, with the protections of its settings. What an
adversary is given is one view of it (see `simulations.privacy.views`) and what anybody knows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Protocol

import typer

from fedpeft.cli import script
from fedpeft.config import RunConfig, load, to_flat
from fedpeft.config.parse import build, overlay, to_tree
from fedpeft.errors import ConfigError, sentence
from fedpeft.experiment import resolve
from fedpeft.training import use_threads
from simulations.privacy import findings
from simulations.privacy.canaries import Canaries
from simulations.privacy.findings import Finding
from simulations.privacy.inversion import Inversion
from simulations.privacy.membership import Membership


class Attack(Protocol):
    """Settings of an attack, which run it."""

    def run(self, config: RunConfig) -> list[Finding]:
        """What the attack comes to on a run of `config`."""
        ...


ATTACKS: Mapping[str, type[Any]] = {"inversion": Inversion, "membership": Membership, "canaries": Canaries}
"""Every attack on privacy, by name. Hostile clients have a command of their own: `simulations.privacy.poisoning`."""


def main(
    name: Annotated[str, typer.Argument(help="One of " + ", ".join(ATTACKS) + ".")],
    config: Annotated[Path, typer.Argument(help="The settings of the run that is attacked.")],
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A setting of the run.")] = None,
    attack: Annotated[list[str] | None, typer.Option(metavar="KEY=VALUE", help="A setting of the attack.")] = None,
    seeds: Annotated[str, typer.Option(help="Seeds with commas between; empty for that of the settings.")] = "",
    out: Annotated[Path | None, typer.Option(help="A file that each finding is added to, a line of JSON.")] = None,
    report: Annotated[
        Path | None, typer.Option(help="The folder of a run of these settings, whose journal and report tell of it.")
    ] = None,
) -> None:
    """Run the federation once for each seed, attack it, print what was found and keep it."""
    chosen = settings_of(name, attack or [])
    asked = load(config, set_ or [])
    every: list[Finding] = []
    for seed in [int(text) for text in seeds.split(",")] if seeds else [asked.seed]:
        run = resolve(replace(asked, seed=seed))
        folder = findings.require_same(run, report) if report else None
        use_threads(run.compute.threads)
        found = chosen.run(run)
        every += found
        if out:
            context = {"run": run.name, "seed": seed, "settings": to_tree(chosen), "config": to_flat(run)}
            findings.write(out, found, context)
        if folder:
            findings.report(folder, found, {"seed": seed, "settings": to_tree(chosen)})
    typer.echo(findings.table(every))


def settings_of(name: str, overrides: list[str]) -> Attack:
    """The settings of the attack `name`.

    Raises:
        ConfigError: there is no such attack or setting.
    """
    if name not in ATTACKS:
        expected = f"one of {', '.join(ATTACKS)}"
        raise ConfigError(sentence("attack", expected=expected, found=repr(name), remedy="name one of them"))
    kind = ATTACKS[name]
    made: Attack = build(kind, overlay(kind, {}, overrides))
    return made


if __name__ == "__main__":
    script(main)
