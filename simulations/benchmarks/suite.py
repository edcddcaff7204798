"""All of the benchmarks that a figure of the README comes from, in one command: a table and `results/NAME.json`.

    python -m simulations.benchmarks.suite --name laptop
    python -m simulations.benchmarks.suite --readme results/laptop.json

Each part measures paired: in each repeat all ways take their turn, so that what a machine does besides meets all of
them. A ratio is a median, and the least where there are several sizes; how far it spread stands beside it. What was not
measured is not in the file. `--only speed` measures one part anew and keeps the others that the file holds. The part
`pfl` wants an environment of its own (`make bench-pfl-env`): without it a suite of all parts says so and goes on, and
one that names it is refused.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
from matplotlib.figure import Figure

from fedpeft.cli import script
from fedpeft.config import RunConfig, load, override
from fedpeft.errors import ConfigError, sentence
from fedpeft.files import write_atomically
from fedpeft.report import drawing
from fedpeft.report.units import relative, times
from fedpeft.sweeps.running import run_sweep
from fedpeft.version import VERSION
from simulations.benchmarks import against_flower, against_pfl, merge, peak, scale, sent, sides, workers
from simulations.benchmarks.ways import DENSE, EXACT, Cell

EDGE, OTHER = ((1, 16), (4, 16)), ((4, 64), (16, 64))
"""Rows of a batch, and tokens that a row is cut at: as on an edge device, and otherwise."""

USEFUL = "| rows × tokens | of the matmul peak, ours | bare loop |\n|---|---:|---:|"

MERGED = Cell(4096, 10)
LIBRARIES = ("flwr", "torch", "transformers", "peft", "numpy")
BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"

WORDS: Mapping[str, str] = {
    "edge_vs_bare_loop": "client updates a second over a bare PyTorch loop, batches of 1 × 16 and 4 × 16 tokens",
    "any_vs_bare_loop": "the same, batches of 4 × 64 and 16 × 64 tokens",
    "useful_flops": "operations that steps need over the machine's measured matmul peak, batches of the demo",
    "vs_flower_ray": "faster than Flower on Ray with a model a message, whole processes, three rounds of the demo",
    "vs_flower_ray_warm": "the same, a round after the first",
    "vs_flower_ray_edge": "faster than that, whole processes, fifteen rounds of batches of 1 × 16 tokens",
    "vs_flower_ray_edge_warm": "the same, a round after the first",
    "vs_pfl": "faster than Apple's pfl, a round after the first, same clients, batches and steps, the demo's batches",
    "vs_pfl_whole": "the same, whole processes, five rounds",
    "vs_pfl_edge": "faster than pfl, a round after the first, batches of 1 × 16 tokens",
    "vs_pfl_edge_whole": "the same, whole processes, fifteen rounds",
    "bytes_vs_lora_fp32": "fewer bytes, both ways, than FedAvg on LoRA in float32, accuracy within half a point",
    "bytes_vs_full": "fewer bytes, both ways, than full fine-tuning in float32, accuracy within half a point",
    "scale_memory_10000_vs_100": "greatest memory of a run of 10,000 clients over that of 100, ten a round",
    "scale_time_10000_vs_100": "seconds of a client's update among 10,000 over those among 100",
    "merge_vs_dense_4096": "faster exact merge of ten unlike ranks at n = 4096 than forming the mean for an SVD",
}
"""What each ratio says, in the order of the table."""

SHARES = ("useful_flops",)
"""Those that are parts of a whole, and no times."""


class Ratio(NamedTuple):
    """How many times, and between which bounds it lay."""

    median: float
    least: float
    most: float


class Part(NamedTuple):
    """What one part found: ratios by name, its tables in Markdown, and a picture where one helps."""

    ratios: Mapping[str, Ratio]
    tables: Sequence[str]
    picture: Figure | None = None


class Size(NamedTuple):
    """How much is measured: clients a round, and of small batches; and against others, `pairs` of processes.

    Against Flower they have `rounds`, against pfl, which starts sooner, `more_rounds`: of four rounds after the first,
    the median is of none that only ours scores. Of small batches both have `edge_rounds`: rounds are so short that
    the median must be of none in which a client's rows are read for the first time.
    """

    clients: int
    edge_clients: int
    repeats: int
    overrides: tuple[str, ...]
    ways: Sequence[workers.Way]
    rounds: int = 3
    more_rounds: int = 5
    edge_rounds: int = 15
    pairs: int = 2


FULL = Size(
    clients=12, edge_clients=32, repeats=3, overrides=("training.steps=2", *sides.FLOAT32), ways=workers.ways_of(2)
)


def spread(values: Sequence[float]) -> Ratio:
    """The median of paired ratios, and their range."""
    return Ratio(statistics.median(values), min(values), max(values))


def speed(settings: Path, size: Size) -> Part:
    """Client updates a second of the in-process engine over a bare loop; for each size of batch its best setting."""
    first, table = load(settings, list(size.overrides)), [workers.HEADING]
    ratios, useful = {}, {}
    cores = max(count for count, _ in size.ways)
    for name, shapes, clients in (
        ("edge_vs_bare_loop", EDGE, size.edge_clients),
        ("any_vs_bare_loop", OTHER, size.clients),
    ):
        best = []
        for rows, tokens in shapes:
            enough = override(first, [f"federation.clients={max(clients, first.federation.clients)}"])
            config = workers.shaped(enough, rows, tokens)
            top = peak.peak(cores)  # anew for each, since a machine that others use is not always as fast
            found = workers.measure(config, size.ways, clients, size.repeats)
            table += workers.rows(config, clients, found)
            ours = {way: workers.over_bare(found, way) for way in size.ways if way[1] != workers.BARE}
            best_way = max(ours, key=lambda way: statistics.median(ours[way]))
            best.append(spread(ours[best_way]))
            useful[rows, tokens] = _useful(config, clients, found, best_way, top)
        ratios[name] = min(best)
    ratios["useful_flops"] = useful[OTHER[-1]][0]
    return Part(ratios, ["\n".join(table), "\n".join([USEFUL, *_useful_lines(useful)])])


def _useful(
    config: RunConfig, clients: int, found: Sequence[Mapping[workers.Way, float]], way: workers.Way, top: float
) -> tuple[Ratio, Ratio]:
    """The share of the peak `top` that goes into what steps need: of ours, and of the faster bare loop."""
    needed = peak.operations(config, clients) / top
    bare = [min(seconds for one, seconds in each.items() if one[1] == workers.BARE) for each in found]
    return spread([needed / each[way] for each in found]), spread([needed / seconds for seconds in bare])


def _useful_lines(useful: Mapping[tuple[int, int], tuple[Ratio, Ratio]]) -> list[str]:
    return [
        f"| {rows} × {tokens} | {ours.median:.2f} | {bare.median:.2f} |"
        for (rows, tokens), (ours, bare) in useful.items()
    ]


def bytes_sent(settings: Path, size: Size) -> Part:  # noqa: ARG001 - as many runs as the sweep's file names
    """Bytes of methods and codecs over seeds; of the fewest whose accuracy is float32 LoRA's within half a point."""
    root, _ = run_sweep(sent.SETTINGS, ["out=runs/benchmark-bytes"], typer.echo)
    rows = [json.loads(line) for line in (root / "results.jsonl").read_text(encoding="utf-8").splitlines()]
    return told(sent.ways(rows))


def told(found: Mapping[tuple[str, ...], sent.Way]) -> Part:
    """The part that these runs are."""
    best = found[sent.best(found)]
    ratios = {"bytes_vs_lora_fp32": spread(best.over(found[sent.PLAIN])), "bytes_vs_full": spread(best.over_full)}
    return Part(ratios, ["\n".join([sent.HEADING, *sent.lines(found)])], sent.picture(found))


def merging(settings: Path, size: Size) -> Part:  # noqa: ARG001 - one cell, whose repeats the benchmark knows
    """How many times faster than a dense SVD the exact merge is."""
    rows = {row.way: row for row in merge.measured([MERGED], merge.ENOUGH_SECONDS)}
    seconds = {way: row.figures.seconds for way, row in rows.items() if row.figures}
    ratio = seconds[DENSE] / seconds[EXACT]
    lines = [f"| {way} | {found:.3g} s |" for way, found in seconds.items()]
    return Part(
        {"merge_vs_dense_4096": Ratio(ratio, ratio, ratio)}, ["\n".join(["| merge | median |", "|---|---:|", *lines])]
    )


def flower(settings: Path, size: Size) -> Part:
    """How many times faster than Flower's Ray engine with a model for each message: as the settings are, and small."""
    ratios: dict[str, Ratio] = {}
    table = [sides.HEADING]
    for edge, words, config, rounds in _tasks(settings, size, size.rounds):
        found = sides.measure(sides.task(config, rounds), size.pairs, against_flower.SIDES)
        over = sides.over(found)
        ratios |= {f"vs_flower_ray{edge}": spread(over["whole"]), f"vs_flower_ray{edge}_warm": spread(over["warm"])}
        table += sides.rows(words, found)
    return Part(ratios, ["\n".join(table)])


def pfl(settings: Path, size: Size) -> Part:
    """How many times faster than Apple's pfl, the faster of its two ways: as the settings are, and small.

    Without the environment that pfl needs there are no ratios, and the table is the sentence that says so.
    """
    try:
        against_pfl.require()
    except ConfigError as missing:
        return Part({}, [f"Not measured: {missing}"])
    ratios: dict[str, Ratio] = {}
    table = [sides.HEADING]
    for edge, words, config, rounds in _tasks(settings, size, size.more_rounds):
        found = sides.measure(against_pfl.task(config, rounds), size.pairs, against_pfl.SIDES)
        over = sides.over(found)
        ratios |= {f"vs_pfl{edge}": spread(over["warm"]), f"vs_pfl{edge}_whole": spread(over["whole"])}
        table += sides.rows(words, found)
    return Part(ratios, ["\n".join(table)])


def _tasks(settings: Path, size: Size, rounds: int) -> Iterator[tuple[str, str, RunConfig, int]]:
    """What others are held against: (what ratios end with, what tables call it, the settings, rounds)."""
    yield "", "as set", load(settings, []), rounds
    yield "_edge", "1 × 16 tokens", workers.shaped(load(settings, list(size.overrides)), *EDGE[0]), size.edge_rounds


def scaling(settings: Path, size: Size) -> Part:
    """What 10,000 clients cost over 100, in memory and in time; each number in its turn."""
    found = scale.measured(settings, scale.CLIENTS, size.repeats)
    ratios = {
        "scale_memory_10000_vs_100": spread(scale.over(found, scale.FEW, scale.MANY, "peak_bytes")),
        "scale_time_10000_vs_100": spread(scale.over(found, scale.FEW, scale.MANY, "update_seconds")),
    }
    return Part(ratios, ["\n".join([scale.HEADING, *scale.lines(found)])], scale.picture(found))


PARTS: Mapping[str, Callable[[Path, Size], Part]] = {
    "speed": speed,
    "flower": flower,
    "pfl": pfl,
    "bytes": bytes_sent,
    "scale": scaling,
    "merge": merging,
}


def results(parts: Mapping[str, Part], before: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What is written: machine, versions, ratios, their spread, and tables; what was there and is not anew stays."""
    kept = before or {}
    ratios = {name: ratio for part in parts.values() for name, ratio in part.ratios.items()}
    return {
        "made": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": {"cpus": os.cpu_count(), "processor": _processor(), "system": platform.platform(terse=True)},
        "versions": {"fedpeft": VERSION, "python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in LIBRARIES},
        "ratios": {**kept.get("ratios", {}), **{name: round(ratio.median, 4) for name, ratio in ratios.items()}},
        "spread": {
            **kept.get("spread", {}),
            **{name: {"least": round(one.least, 4), "most": round(one.most, 4)} for name, one in ratios.items()},
        },
        "tables": {**kept.get("tables", {}), **{name: list(part.tables) for name, part in parts.items()}},
    }


def summary(found: Mapping[str, Any]) -> str:
    """The table of ratios in Markdown, and where and when they were measured."""
    lines = ["| figure | median | range |", "|---|---:|---|"]
    for name, words in WORDS.items():
        if name in found["ratios"]:
            bounds = found["spread"][name]
            shown = relative if name in SHARES else times
            around = f"{shown(bounds['least'])} to {shown(bounds['most'])}"
            lines.append(f"| {words} | {shown(found['ratios'][name])} | {around} |")
    machine, versions = found["machine"], found["versions"]
    made = f"Measured {found['made']} on {machine['cpus']} cores ({machine['processor']})"
    return "\n".join([*lines, "", f"{made}, torch {versions['torch']}, by `make bench`."])


def put(text: str, found: Mapping[str, Any]) -> str:
    """`text` with the table between its two marks.

    Raises:
        ConfigError: it has no such marks.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ConfigError(sentence("README.md", expected=f"{BEGIN} and {END}", found="none", remedy="put them in"))
    return f"{before}{BEGIN}\n{summary(found)}\n{END}{after}"


def _processor() -> str:
    """What the processor calls itself."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.machine())


def main(
    name: Annotated[str, typer.Option(help="What the file is called.")] = "local",
    only: Annotated[str, typer.Option(help=f"Some of {', '.join(PARTS)}, with commas between.")] = ",".join(PARTS),
    settings: Annotated[Path, typer.Option(help="Whose clients are trained for speed.")] = Path(
        "simulations/demo.toml"
    ),
    out: Annotated[Path, typer.Option(help="The folder of results.")] = Path("results"),
    readme: Annotated[Path | None, typer.Option(help="Measure nothing; put this file's table into README.md.")] = None,
) -> None:
    """Measure, print tables, and write results/NAME.json after each part."""
    if readme:
        page = Path("README.md")
        text = put(page.read_text(encoding="utf-8"), json.loads(readme.read_text(encoding="utf-8")))
        write_atomically(page, text.encode())
        return
    unknown = [part for part in only.split(",") if part not in PARTS]
    if unknown:
        raise ConfigError(
            sentence("--only", expected=f"some of {', '.join(PARTS)}", found=unknown[0], remedy="name one")
        )
    if "pfl" in only.split(",") and only != ",".join(PARTS):
        against_pfl.require()
    path = out / f"{name}.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for part in only.split(","):
        measured = PARTS[part](settings, FULL)
        if measured.ratios or part not in found.get("tables", {}):  # what was measured before outlives a part left out
            found = results({part: measured}, found)
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(path, (json.dumps(found, indent=2) + "\n").encode())
        if measured.picture:
            drawing.write_picture(measured.picture, out / f"{name}-{part}.svg")
        typer.echo("\n".join([f"\n{part}\n", *measured.tables]))
    typer.echo(f"\n{summary(found)}\n\nWritten to {path}.")


if __name__ == "__main__":
    script(main)
