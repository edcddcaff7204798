"""Hostile clients against every rule that is to withstand them.

    python -m simulations.privacy.poisoning --out runs/poisoning

Attack by rule, with sites alike and with sites of unlike labels, with as many attackers as the rules are set for and
with far more. Each cell is one federation on frozen features (`--bench models` trains the real model, which takes
hours). What is counted: rows that the final adapter labels rightly and what the attack took away of that; rows with a
backdoor's trigger that are taken for the target's; and, of rules that choose among updates, honest ones turned away.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import typer

from fedpeft.cli import script
from fedpeft.config import RunConfig, load, override
from fedpeft.config.robust import Bulyan, GeometricMedian, Krum, MultiKrum, NormBound
from fedpeft.errors import ConfigError, sentence
from fedpeft.experiment import resolve
from fedpeft.merges.exactness import measured_modules
from fedpeft.merges.gram import flat_gram, update_gram
from fedpeft.merges.robust import Judge, bulyan_selection, geometric_median, krum, multi_krum, norm_bound
from fedpeft.randomness import rng
from fedpeft.runs import RunFolder, reopen
from fedpeft.strategy import sent
from fedpeft.training import use_threads
from fedpeft.updates import ServerState, Update
from simulations.privacy import figures, findings
from simulations.privacy.benches import Answers, Bench, FrozenFeatures, on_models
from simulations.privacy.figures import Interval
from simulations.privacy.findings import Finding
from simulations.privacy.hostile import ATTACKS

SET_FOR = 2
"""How many attackers the rules are set for."""

RULES: Mapping[str, tuple[str, ...]] = {
    "fedavg": (),
    "norm_bound": (),
    "median": (),
    "trimmed_mean": (f"aggregation.merge.trimmed_mean.trimmed={SET_FOR}",),
    "geometric_median": (),
    "krum": (f"aggregation.merge.krum.byzantine={SET_FOR}",),
    "multi_krum": (f"aggregation.merge.multi_krum.byzantine={SET_FOR}",),
    "bulyan": (f"aggregation.merge.bulyan.byzantine={SET_FOR}",),
}
"""The rules that are compared, and what their runs are told."""

SKEWS: Mapping[str, tuple[str, ...]] = {
    "iid": ("data.partition.by=iid",),
    "labels": ("data.partition.by=dirichlet", "data.partition.by.dirichlet.alpha=0.3"),
}
"""How rows are dealt out."""

BENCHES: Mapping[str, Callable[[], Bench]] = {"features": FrozenFeatures, "models": lambda: on_models}
"""Where federations are run."""

GRID = tuple((skew, attackers) for skew in SKEWS for attackers in (SET_FOR, 6))
FULL = tuple((skew, attackers) for skew in SKEWS for attackers in (1, SET_FOR, 4, 6))
"""Skews and numbers of attackers: the small grid, and the whole one."""

_JUDGES: Mapping[type, Any] = {
    Krum: lambda chosen: krum(chosen.byzantine),
    MultiKrum: lambda chosen: multi_krum(chosen.byzantine, chosen.kept),
    Bulyan: lambda chosen: bulyan_selection(chosen.byzantine),
    GeometricMedian: lambda chosen: geometric_median(chosen.iterations),
    NormBound: lambda chosen: norm_bound(chosen.limit),
}
"""By the settings of a rule, who judges whole updates for it."""

_CHOOSE = ("krum", "multi_krum", "bulyan")
"""The rules that turn updates away."""


class Cell(NamedTuple):
    """One federation."""

    skew: str
    attackers: int
    attack: str
    rule: str
    seed: int


@dataclass
class Judged:
    """What a rule did, round by round: the attackers' weight, and whom of the honest it turned away, by partition."""

    weights: list[float] = field(default_factory=list)
    honest: Counter[int] = field(default_factory=Counter)
    rejected: Counter[int] = field(default_factory=Counter)

    @property
    def worst(self) -> float:
        """The share of its updates that the honest client lost who lost most."""
        return max((self.rejected[partition] / count for partition, count in self.honest.items()), default=0.0)


class Outcome(NamedTuple):
    """What a federation came to; `judged` is None where its rule judges no whole updates."""

    answers: Answers
    judged: Judged | None


def main(
    settings: Annotated[Path, typer.Argument(help="The settings that all federations share.")] = Path(
        "simulations/privacy/poisoning.toml"
    ),
    out: Annotated[Path, typer.Option(help="Where the findings and the tables are written.")] = Path("runs/poisoning"),
    attacks: Annotated[str, typer.Option(help="Attacks with commas between; empty for all.")] = "",
    rules: Annotated[str, typer.Option(help="Rules with commas between; empty for all.")] = "",
    seeds: Annotated[str, typer.Option(help="Seeds with commas between; empty for that of the settings.")] = "",
    full: Annotated[bool, typer.Option("--full", help="More numbers of attackers, under both skews.")] = False,
    bench: Annotated[str, typer.Option(help="features, or models.")] = "features",
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE")] = None,
    report: Annotated[
        Path | None, typer.Option(help="The folder of a run with the settings of a cell, whose report tells of those.")
    ] = None,
) -> None:
    """Run every federation, then print the tables and write them beside the findings."""
    shared = load(settings, set_ or [])
    chosen = [_named("--attacks", attacks, ATTACKS), _named("--rules", rules, RULES)]
    numbers = [int(text) for text in seeds.split(",")] if seeds else [shared.seed]
    grid = [
        Cell(skew, attackers, attack, rule, seed)
        for skew, attackers in (FULL if full else GRID)
        for attack in dict.fromkeys(("none", *chosen[0]))
        for rule in chosen[1]
        for seed in numbers
    ]
    reported = require_some(grid, shared, report) if report else []
    (name,) = _named("--bench", bench, BENCHES)
    made = BENCHES[name]()
    outcomes = {cell: outcome_of(cell, shared, made) for cell in grid}
    out.mkdir(parents=True, exist_ok=True)
    for cell in grid:
        context = {"run": shared.name, "bench": name, **cell._asdict()}
        findings.write(out / "findings.jsonl", findings_of(cell, outcomes), context)
        if report and cell in reported:
            findings.report(RunFolder(report), findings_of(cell, outcomes), context)
    text = "\n".join(tables(outcomes))
    (out / "table.md").write_text(text, encoding="utf-8")
    typer.echo(text)


def config_of(cell: Cell, shared: RunConfig) -> RunConfig:
    """The settings of a cell's federation, hostile clients apart."""
    sets = (f"seed={cell.seed}", f"aggregation.merge.rule={cell.rule}", *RULES[cell.rule], *SKEWS[cell.skew])
    return resolve(override(shared, sets))


def require_some(grid: Sequence[Cell], shared: RunConfig, root: Path) -> list[Cell]:
    """The cells of the settings of the run in the folder `root`, whatever their seeds.

    Raises:
        RunFolderError: there is no run.
        ConfigError: there is no such cell.
    """
    folder, stored = reopen(root, [])
    differing = {cell: findings.unlike(config_of(cell, shared), stored) for cell in grid}
    same = [cell for cell, keys in differing.items() if not keys]
    if not same:
        nearest = min(differing.values(), key=len)
        expected, found = f"the settings of the run in {root} in some cell", f"another {', '.join(nearest)} in each"
        remedy = f"give those of {folder.config}, its rule and its partition among them"
        raise ConfigError(sentence("--report", expected=expected, found=found, remedy=remedy))
    return same


def outcome_of(cell: Cell, shared: RunConfig, bench: Bench) -> Outcome:
    """The federation of one cell is run and judged."""
    config = config_of(cell, shared)
    use_threads(config.compute.threads)
    attackers = attackers_of(config, cell.attackers)
    seen = Judged()

    def heard(state: ServerState, updates: Mapping[int, Update]) -> None:
        shares = shares_of(config, state, updates)
        if shares is not None:
            given = dict(zip(sorted(updates), (shares / shares.sum()).tolist(), strict=True))
            honest = {partition: share for partition, share in given.items() if partition not in attackers}
            seen.honest.update(honest.keys())
            seen.rejected.update(partition for partition, share in honest.items() if share == 0)
            seen.weights.append(sum(given.values()) - sum(honest.values()))

    answers = bench(config, attackers, ATTACKS[cell.attack], heard)
    return Outcome(answers, seen if seen.honest else None)


def attackers_of(config: RunConfig, count: int) -> frozenset[int]:
    """Which partitions are hostile: so many, by chance."""
    drawn = rng(config.seed, "attackers").permutation(config.federation.clients)[:count]
    return frozenset(int(partition) for partition in drawn)


def shares_of(config: RunConfig, state: ServerState, updates: Mapping[int, Update]) -> np.ndarray | None:
    """How much of each update, in order of partition, the run's rule uses; None where it judges no whole updates."""
    chosen = config.aggregation.merge.chosen
    if type(chosen) not in _JUDGES:
        return None
    judge: Judge = _JUDGES[type(chosen)](chosen)
    ordered = [update for _, update in sorted(updates.items())]
    deltas, weights = [one.delta for one in ordered], np.array([float(one.examples) for one in ordered])
    if getattr(chosen, "space", "factors") == "products":
        received = [sent(state.adapter, one.spec).tensors for one in ordered]
        gram = update_gram(measured_modules(state.adapter.spec, ()), received, deltas)
    else:
        gram = flat_gram(deltas)
    return judge.judge(gram, weights).shares


def findings_of(cell: Cell, outcomes: Mapping[Cell, Outcome]) -> Iterator[Finding]:
    """What one cell says."""
    attack, adversary = f"poisoning, {cell.attack}", f"{cell.attackers} clients, against {cell.rule}, {cell.skew}"
    answers, judged = outcomes[cell]
    calm = outcomes[cell._replace(attack="none")].answers

    def of(metric: str, interval: Interval, n: int) -> Finding:
        return findings.found(attack, adversary, metric, interval, n)

    yield of("accuracy", figures.rate(answers.hits, answers.rows), answers.rows)
    lost = calm.hits / calm.rows - answers.hits / answers.rows
    yield findings.exactly(attack, adversary, "accuracy lost to the attack", lost, answers.rows)
    yield of(
        "triggered rows taken for the target's", figures.rate(answers.taken_in, answers.triggered), answers.triggered
    )
    if judged:
        yield of("weight of the attackers", figures.mean(np.array(judged.weights)), len(judged.weights))
    if judged and cell.rule in _CHOOSE:
        rejected, honest = judged.rejected.total(), judged.honest.total()
        yield of("honest updates turned away", figures.rate(rejected, honest), honest)
        yield findings.exactly(attack, adversary, "turned away of one honest client", judged.worst, len(judged.weights))


def tables(outcomes: Mapping[Cell, Outcome]) -> Iterator[str]:
    """In Markdown, for each skew and number of attackers: accuracy, backdoors, and what rules did to honest updates."""
    for skew, attackers in dict.fromkeys((cell.skew, cell.attackers) for cell in outcomes):
        here = {cell: one for cell, one in outcomes.items() if (cell.skew, cell.attackers) == (skew, attackers)}
        rules = list(dict.fromkeys(cell.rule for cell in here))
        yield f"### {attackers} attackers, sites by {skew}\n"
        for title, figure in _TABLES.items():
            yield f"| {title} | " + " | ".join(rules) + " |\n|---|" + "---:|" * len(rules)
            for attack in dict.fromkeys(cell.attack for cell in here):
                of_attack = {rule: _of(here, attack, rule) for rule in rules}
                yield f"| {attack} | " + " | ".join(figure(of_attack[rule], rule) for rule in rules) + " |"
            yield ""


def _of(outcomes: Mapping[Cell, Outcome], attack: str, rule: str) -> list[Outcome]:
    """The outcomes of one attack on one rule, one a seed."""
    return [one for cell, one in outcomes.items() if (cell.attack, cell.rule) == (attack, rule)]


def _accuracy(of_seeds: Sequence[Outcome], rule: str) -> str:  # noqa: ARG001
    return _percent([one.answers.hits / one.answers.rows for one in of_seeds])


def _success(of_seeds: Sequence[Outcome], rule: str) -> str:  # noqa: ARG001
    return _percent([one.answers.taken_in / max(1, one.answers.triggered) for one in of_seeds])


def _weight(of_seeds: Sequence[Outcome], rule: str) -> str:  # noqa: ARG001
    return _percent([float(np.mean(one.judged.weights)) for one in of_seeds if one.judged])


def _rejected(of_seeds: Sequence[Outcome], rule: str) -> str:
    judged = [one.judged for one in of_seeds if one.judged and rule in _CHOOSE]
    return _percent([one.rejected.total() / one.honest.total() for one in judged])


def _worst(of_seeds: Sequence[Outcome], rule: str) -> str:
    return _percent([one.judged.worst for one in of_seeds if one.judged and rule in _CHOOSE])


_TABLES: Mapping[str, Callable[[Sequence[Outcome], str], str]] = {
    "accuracy, %": _accuracy,
    "trigger works, %": _success,
    "weight of attackers, %": _weight,
    "honest updates turned away, %": _rejected,
    "of one honest client, at most, %": _worst,
}
"""What is told of each skew and number of attackers, and how it is made of the outcomes of the seeds."""


def _percent(shares: Sequence[float]) -> str:
    return f"{100 * np.mean(shares):.1f}" if shares else "–"


def _named(option: str, names: str, known: Mapping[str, object]) -> list[str]:
    """Names with commas between, or all, of which each is in `known`.

    Raises:
        ConfigError: one is not.
    """
    found = names.split(",") if names else list(known)
    for name in found:
        if name not in known:
            expected = f"some of {', '.join(known)}"
            raise ConfigError(sentence(option, expected=expected, found=repr(name), remedy="name those"))
    return found


if __name__ == "__main__":
    script(main)
