"""Methods of every family on the same federation, and three of them on a chat model and on a vision transformer.

    python -m simulations.methods.compare --out runs/methods

Each run is `fedpeft simulate` in a process of its own; a run that is finished is not done again, and one that was
cut off is resumed. The table is made from the runs' journals alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from fedpeft import journal
from fedpeft.adapters import KINDS
from fedpeft.cli import script
from fedpeft.config import from_flat
from fedpeft.config.adapters.methods import TIERS
from fedpeft.errors import ConfigError, sentence
from fedpeft.experiment import adapted_model, evaluator_of
from fedpeft.report.units import human_bytes, human_count
from fedpeft.runs import reopen
from simulations.runs import cpu_seconds, run_to_end

Methods = Mapping[str, tuple[str, ...]]
"""Methods by the name that the table gives them, and what their runs are told beside the family."""

TEXT: Methods = {
    "lora": (),
    "lora, dora": ("adapter.lora.dora=true",),
    "lora, freeze_a": ("adapter.lora.freeze_a=true", "training.learning_rate=1e-2"),
    "lora_sb": ("training.learning_rate=3e-2", "aggregation.merge.rule=fed_sb"),
    "adalora": ("training.learning_rate=1e-2",),
    "loha": (),
    "lokr": ("training.learning_rate=1e-2",),
    "hira": (),
    "miss": (),
    "c3a": ("training.learning_rate=3e-2",),
    "shira": ("training.learning_rate=1e-2",),
    "oft": ("training.learning_rate=1e-2",),
    "vera": ("training.learning_rate=3e-2",),
    "fourierft": ("training.learning_rate=3e-2",),
    "road": ("training.learning_rate=1e-2",),
    "ia3": ("training.learning_rate=1e-2",),
    "ln_tuning": ("training.learning_rate=1e-2",),
    "bitfit": ("training.learning_rate=1e-2",),
    "fish_mask": ("training.learning_rate=1e-3", "data.server_rows=128"),
    "fish_mask, balanced": (
        "training.learning_rate=1e-3",
        "data.server_rows=128",
        "adapter.fish_mask.balanced=true",
    ),
    "ssf": ("training.learning_rate=1e-2",),
    "houlsby": (),
    "parallel": (),
    "prompt_tuning": ("training.learning_rate=3e-2",),
    "prefix_tuning": ("training.learning_rate=1e-2",),
    "p_tuning": (),
    "lora+bitfit": (),
    "parallel+prefix_tuning": (),
    "head_only": (),
}
CHAT: Methods = {
    "lora": (),
    "ia3": ("training.learning_rate=5e-3",),
    "prompt_tuning": ("training.learning_rate=1e-2",),
}
IMAGES: Methods = {
    "lora": (),
    "ia3": ("training.learning_rate=5e-3",),
    "ssf": ("training.learning_rate=5e-3",),
    "visual_prompt": ("training.learning_rate=5e-3",),
    "head_only": (),
}
SUITES: Mapping[str, Methods] = {"text": TEXT, "chat": CHAT, "images": IMAGES}
"""What is run, by the kind of model."""

SETTINGS: Mapping[str, str] = {"text": "methods/text", "chat": "methods/chat", "images": "tasks/images"}
"""The settings of each, under `simulations`."""


class Row(NamedTuple):
    """One line of the table."""

    suite: str
    method: str
    tier: str
    figures: Mapping[str, float]
    metric: str
    trained: int
    moved: int
    cpu_seconds: float


def main(
    out: Annotated[Path, typer.Option(help="Where the runs are.")] = Path("runs/methods"),
    suites: Annotated[str, typer.Option(help="Of text, chat and images, with commas between.")] = ",".join(SUITES),
    methods: Annotated[str, typer.Option(help="Methods with semicolons between; empty for all.")] = "",
    processes: Annotated[int, typer.Option(min=1, help="Runs at the same time, of one thread each.")] = 2,
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE")] = None,
) -> None:
    """Run what is not there yet, then print the table and write it beside the runs."""
    chosen = _known("--suites", suites.split(","), SUITES)
    every = {method: None for suite in chosen for method in SUITES[suite]}
    wanted = _known("--methods", methods.split(";"), every) if methods else every
    jobs = [(suite, method) for suite in chosen for method in SUITES[suite] if method in wanted]
    with ThreadPoolExecutor(processes) as pool:
        list(pool.map(lambda job: run(out, job[0], job[1], set_ or []), jobs))
    rows = [row_of(suite, method, folder_of(out, suite, method)) for suite, method in jobs]
    if any(suite == "chat" for suite, _ in jobs):
        rows.append(untrained(folder_of(out, "chat", "lora")))
    text = table(rows)
    (out / "table.md").write_text(text, encoding="utf-8")
    typer.echo(text)


def _known(option: str, names: Sequence[str], known: Mapping[str, object]) -> Sequence[str]:
    """`names`, of which each is in `known`.

    Raises:
        ConfigError: one is not.
    """
    for name in names:
        if name not in known:
            expected = f"some of {', '.join(known)}"
            raise ConfigError(sentence(option, expected=expected, found=repr(name), remedy="name those"))
    return names


def run(out: Path, suite: str, method: str, overrides: Sequence[str]) -> None:
    """The run of one method is finished."""
    sets = [f"adapter.family={method.split(',')[0]}", *SUITES[suite][method], *overrides]
    settings = Path(__file__).parent.parent / f"{SETTINGS[suite]}.toml"
    sets += ["evaluation.every=0", "evaluation.samples=0", "compute.threads=1"]
    run_to_end(settings, folder_of(out, suite, method), sets, bounds=False)


def folder_of(out: Path, suite: str, method: str) -> Path:
    """Where a run is."""
    return out / suite / method.replace(", ", "-").replace("+", "-")


def row_of(suite: str, method: str, folder: Path) -> Row:
    """What the journal of one run comes to."""
    records = journal.read(folder / "journal.jsonl")
    start, end = records[0], next(record for record in records if record["event"] == "end")
    config = from_flat(start["config"])
    kinds = [part.build().kind for part in (config.adapter.members[name] for name in config.adapter.names)]
    order = list(TIERS)
    tier = max((KINDS[kind].mean for kind in kinds), key=order.index)
    task: Any = config.task.chosen
    return Row(
        suite,
        method,
        TIERS[tier],
        end["evaluation"],
        task.metrics[0],
        start["adapter"]["trainable_parameters"],
        end["bytes_up"] + end["bytes_down"],
        cpu_seconds(folder),
    )


def untrained(folder: Path) -> Row:
    """The model that a run began with, on the same held-out rows; of a task without a last layer of its own."""
    config = reopen(folder, [])[1]
    task: Any = config.task.chosen
    figures = evaluator_of(config)(adapted_model(config).initial)
    return Row("chat", "the model as it is", "–", figures, task.metrics[0], 0, 0, 0.0)


def table(rows: Sequence[Row]) -> str:
    """The comparison in Markdown: best first within a suite."""
    lines = [
        "| | method | averages | held-out | loss | trained | moved | CPU-seconds |",
        "|---|---|---|---:|---:|---:|---:|---:|",
    ]
    for row in sorted(rows, key=lambda row: (list(SUITES).index(row.suite), row.figures["loss"])):
        value = row.figures[row.metric]
        shown = f"{row.metric} {value:.2f}" if row.metric == "perplexity" else f"{row.metric} {100 * value:.1f} %"
        lines.append(
            f"| {row.suite} | `{row.method}` | {row.tier} | {shown} | {row.figures['loss']:.3f} "
            f"| {human_count(row.trained)} | {human_bytes(row.moved)} | {row.cpu_seconds:.0f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    script(main)
