"""Every rule on the same sites of unlike rank, the same seeds and the same budget, with what bounds them.

    python -m simulations.heterogeneity.compare --seeds 7,8,9 --out runs/heterogeneity

Each run is `fedpeft simulate` in a process of its own; a run that is finished is not done again, and one that was
cut off is resumed, so the comparison can be stopped and started. The table is made from the runs' journals alone.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import matplotlib.figure
import typer

from fedpeft import checkpoint, journal
from fedpeft.adapters import AdapterState, at_rank, resized
from fedpeft.cli import script
from fedpeft.experiment import evaluator_of, strategy_of
from fedpeft.memory import FolderMemory
from fedpeft.runs import reopen
from simulations.runs import run_to_end

RULES: Mapping[str, tuple[str, ...]] = {
    "fedit": (),
    "zero_pad": (),
    "hetlora": (),
    "flora": (),
    "fedex": (),
    "flexlora": (),
    "ffa_lora": (),
    "rolora": (),
    "fedsa_lora": (),
    "fed_sb": ("adapter.family=lora_sb", "training.learning_rate=3e-2"),  # R needs a larger step
    "lora_fair": (),
}
"""The rules that are compared, and what else their runs are told."""

BOUNDED = "fedit"
"""The rule whose runs measure the bounds too; they do not depend on the rule."""


@dataclass(frozen=True)
class Row:
    """One line of the table: figures of a rule, or of a bound, one for each seed."""

    name: str
    accuracy: tuple[float, ...]
    first_error: tuple[float, ...] = ()
    last_error: tuple[float, ...] = ()
    megabytes: tuple[float, ...] = ()
    rank: int = 0


def main(
    settings: Annotated[Path, typer.Argument(help="The settings that all runs share.")] = Path(
        "simulations/heterogeneity/ranks.toml"
    ),
    seeds: Annotated[str, typer.Option(help="Numbers with commas between.")] = "7,8,9",
    rules: Annotated[str, typer.Option(help="Rules with commas between; empty for all.")] = "",
    out: Annotated[Path, typer.Option(help="Where the runs are.")] = Path("runs/heterogeneity"),
    processes: Annotated[int, typer.Option(min=1, help="Runs at the same time, of one thread each.")] = 2,
    bounds: Annotated[bool, typer.Option(help="Measure what sites reach alone and on pooled data.")] = True,
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE")] = None,
) -> None:
    """Run what is not there yet, then print the table and write it and its plot beside the runs."""
    chosen, numbers = rules.split(",") if rules else list(RULES), [int(seed) for seed in seeds.split(",")]
    jobs = [(rule, seed) for seed in numbers for rule in chosen]
    with ThreadPoolExecutor(processes) as pool:
        list(pool.map(lambda job: run(settings, out, *job, bounds=bounds, overrides=set_ or []), jobs))
    rows = [row_of(rule, [out / f"{rule}-{seed}" for seed in numbers]) for rule in chosen]
    bounded = [journal.read(out / f"{BOUNDED}-{seed}" / "journal.jsonl") for seed in numbers] if bounds else []
    bound_rows = list(bounds_of(bounded)) if bounds else []
    text = table(rows, bound_rows, len(numbers))
    (out / "table.md").write_text(text)
    draw(rows, bound_rows).savefig(out / "accuracy.svg")
    typer.echo(text)


def run(settings: Path, out: Path, rule: str, seed: int, *, bounds: bool, overrides: Sequence[str]) -> None:
    """The run of one rule on one seed is finished; an error of it ends the comparison with its last words."""
    sets = [f"seed={seed}", f"aggregation.merge.rule={rule}", *RULES[rule], *overrides]
    run_to_end(settings, out / f"{rule}-{seed}", sets, bounds=bounds and rule == BOUNDED)


def row_of(rule: str, folders: Sequence[Path]) -> Row:
    """What the runs of one rule come to; where adapters are personal, the accuracy is the mean of the sites' own."""
    runs = [journal.read(folder / "journal.jsonl") for folder in folders]
    rounds = [[record for record in run if record["event"] == "round"] for run in runs]
    ends = [next(record for record in run if record["event"] == "end") for run in runs]
    errors = [[record.get("merge_error") for record in of_run] for of_run in rounds]
    own = [personal_accuracy(folder) for folder in folders]
    return Row(
        rule,
        tuple(mine if mine is not None else end["evaluation"]["accuracy"] for mine, end in zip(own, ends, strict=True)),
        tuple(found[0] for found in errors if found[0] is not None),
        tuple(found[-1] for found in errors if found[-1] is not None),
        tuple((end["bytes_up"] + end["bytes_down"]) / 1e6 for end in ends),
        int(max(of_run[-1].get("residual_rank") or 0 for of_run in rounds)),
    )


def personal_accuracy(folder: Path) -> float | None:
    """The mean accuracy of the sites' own adapters on the held-out rows; None where the federation shares one."""
    run, config = reopen(folder, [])
    strategy, state = strategy_of(config), checkpoint.load(run.checkpoint)
    if not strategy.stage.local(state.adapter.spec, state.round):
        return None
    evaluate, memories, found = evaluator_of(config), FolderMemory(run.memories), []
    for partition in range(config.federation.clients):
        memory = memories.load(state.run, partition, state.round + 1)
        local = strategy.stage.local(state.adapter.spec, state.round)
        mine = {key: memory.tensors[key] for key in local if key in memory.tensors}
        if mine:
            spec = at_rank(state.adapter.spec, next(iter(mine.values())).shape[1])
            shared = resized(state.adapter.tensors, spec)
            found.append(evaluate(AdapterState(spec, {**shared, **mine}))["accuracy"])
    return float(statistics.mean(found))


def bounds_of(runs: Sequence[Sequence[Mapping[str, Any]]]) -> Iterator[Row]:
    """A row for each bound that the runs measured."""
    found = [next(record["rows"] for record in run if record["event"] == "bounds") for run in runs]
    for same in zip(*found, strict=True):
        yield Row(same[0]["name"], tuple(one["evaluation"]["accuracy"] for one in same))


def table(rows: Sequence[Row], bounds: Sequence[Row], seeds: int) -> str:
    """The comparison in Markdown, best rule first."""
    lines = [
        f"| | accuracy, % ({seeds} seeds) | merge error, round 1 | last round | MB moved | rank in the base |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in sorted(rows, key=lambda row: -statistics.mean(row.accuracy)):
        errors = (percent(row.first_error), percent(row.last_error))
        moved = f"{statistics.mean(row.megabytes):.1f}"
        lines.append(f"| `{row.name}` | {spread(row)} | {errors[0]} | {errors[1]} | {moved} | {row.rank or '–'} |")
    lines += [f"| *{row.name}* | {spread(row)} | | | | |" for row in bounds]
    return "\n".join(lines) + "\n"


def spread(row: Row) -> str:
    """Mean and standard deviation over the seeds, in percent."""
    deviation = statistics.stdev(row.accuracy) if len(row.accuracy) > 1 else 0.0
    return f"{100 * statistics.mean(row.accuracy):.1f} ± {100 * deviation:.1f}"


def percent(errors: Sequence[float]) -> str:
    """A mean error in percent; exact to float32 where it is below what that can tell."""
    if not errors:
        return "–"
    mean = statistics.mean(errors)
    return f"{100 * mean:.1f} %" if mean >= 5e-5 else f"{mean:.0e}"


def draw(rows: Sequence[Row], bounds: Sequence[Row]) -> matplotlib.figure.Figure:
    """Accuracy of each rule, a dot for each seed and a bar for the mean, between the bounds."""
    ordered = sorted(rows, key=lambda row: statistics.mean(row.accuracy))
    figure = matplotlib.figure.Figure(figsize=(7.2, 0.34 * len(ordered) + 1.4), layout="constrained")
    axes = figure.add_subplot()
    for at, row in enumerate(ordered):
        axes.plot([100 * value for value in row.accuracy], [at] * len(row.accuracy), "o", color="0.65", markersize=4)
        axes.plot(100 * statistics.mean(row.accuracy), at, "|", color="C0", markersize=16, markeredgewidth=2.5)
    for bound in bounds:
        value = 100 * statistics.mean(bound.accuracy)
        axes.axvline(value, color="0.4", linewidth=0.8, linestyle="--")
        axes.annotate(bound.name, (value, 1.0), (0, 3), ("data", "axes fraction"), "offset points", ha="center", size=8)
    axes.set_yticks(range(len(ordered)), [row.name for row in ordered])
    axes.set_xlabel("accuracy on held-out rows, %")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


if __name__ == "__main__":
    script(main)
