"""`fedpeft check`: what a run will cost, before anything is trained."""

from __future__ import annotations

from pathlib import Path

import typer

from fedpeft.config import RunConfig, load
from fedpeft.experiment import adapted_model, check_plan, deal_rows, learner_of, resolve, strategy_of, test_examples
from fedpeft.report.tables import Table, render_plain
from fedpeft.report.units import human_bytes, human_count
from fedpeft.training import fit_memory_bytes


def run_check(path: Path, overrides: list[str]) -> None:
    """Prints the costs of the run; settings, data and model have been found usable."""
    config = resolve(load(path, overrides))
    typer.echo(render_plain(costs(config)))


def costs(config: RunConfig) -> Table:
    """What the run trains, sends and holds in memory, each with how it was found.

    Raises:
        FedPeftError: settings, data or model cannot be used.
    """
    adapted = adapted_model(config)
    check_plan(config, adapted)
    dealt = deal_rows(config)
    strategy, cohort = strategy_of(config), config.federation.cohort
    down = strategy.codec.size(adapted.spec)
    up = strategy.codec.size(strategy.stage.shared(adapted.spec))
    base, rounds = adapted.base_parameters, config.rounds
    share = adapted.spec.parameters / base
    fit_bytes = fit_memory_bytes(learner_of(config, test_examples(config)))
    rows = (
        ("base model", f"{human_count(base)} parameters, {human_bytes(4 * base)} in float32"),
        ("trained", f"{human_count(adapted.spec.parameters)} parameters ({share:.2%} of the base)"),
        ("a client receives", f"{human_bytes(down)} a round"),
        ("a client sends", f"{human_bytes(up)} a round"),
        ("a round moves", f"{human_bytes(cohort * (up + down))} over {cohort} clients"),
        ("the run moves", f"{human_bytes(rounds * cohort * (up + down))} over {rounds} rounds"),
        ("the full model would move", human_bytes(rounds * cohort * 8 * base)),
        (
            "memory to train",
            f"{human_bytes(4 * base + fit_bytes)}: base, adapter, AdamW, one longest batch; libraries apart",
        ),
        ("rows to train on", f"{dealt.report.train_rows}, of which sites hold {sum(map(len, dealt.sites))}"),
        ("held-out rows", f"{dealt.report.test_rows}, {dealt.report.test_overlap:.1%} also in training"),
        ("repeats removed", str(dealt.report.repeats_removed)),
    )
    return Table(("what", "how much"), rows)
