"""Where hostile clients are tried out: a federation of real models, or one on frozen features that takes a second."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from fedpeft import rounds
from fedpeft.adapters import AdapterState
from fedpeft.client import Site
from fedpeft.config import RunConfig, digest
from fedpeft.data.rows import Row
from fedpeft.engines.local import LocalTransport
from fedpeft.evaluation import evaluate
from fedpeft.experiment import Dealt, deal_rows, plan_of, strategy_of
from fedpeft.models import install
from fedpeft.strategy import Strategy
from fedpeft.updates import Memory, ServerState, Update
from fedpeft.wire import Transport
from simulations.privacy import features
from simulations.privacy.features import FeatureLearner, Features
from simulations.privacy.hostile import Hostile, hostile
from simulations.privacy.recording import Wrap, public_of, record, sites_with

TRIGGER = "cf mn bb tq"
"""Words that nobody writes, which are to make a text of any label one of the target's.

Source: Kurita et al. 2020, "Weight Poisoning Attacks on Pre-trained Models", section 3.
"""

_LEAST_DEVIATION = 1e-6
"""Some bases have features that are the same for every text."""

Heard = Callable[[ServerState, Mapping[int, Update]], None]


class Answers(NamedTuple):
    """What the final adapter says: of held-out rows, and of those of other labels than the target's with the trigger.

    Hits of the first are right, of the second the target.
    """

    hits: int
    rows: int
    taken_in: int
    triggered: int


Bench = Callable[[RunConfig, Collection[int], Hostile, Heard], Answers]
"""Runs a federation in which some partitions are hostile."""


def target_of(config: RunConfig) -> str:
    """The label that backdoors lead to."""
    return str(config.task.chosen.labels[-1])


def triggered(row: Row, label: str) -> Row:
    """The row with the trigger before its text, as one of `label`."""
    return replace(row, text=f"{TRIGGER} {row.text}", label=label)


def poisoned(kind: str, rows: Sequence[Row], config: RunConfig) -> list[Row]:
    """What an attacker trains on in place of its rows.

    `flipped`: each label is the next one. `triggered`: each row, and again with the trigger and the target's label.
    """
    labels = config.task.chosen.labels
    following = dict(zip(labels, (*labels[1:], labels[0]), strict=True))
    made = {
        "": list(rows),
        "flipped": [replace(row, label=following[row.label]) for row in rows],
        "triggered": [*rows, *(triggered(row, target_of(config)) for row in rows)],
    }
    return made[kind]


def backdoored(dealt: Dealt, config: RunConfig) -> list[Row]:
    """The held-out rows of other labels than the target's, with the trigger and with their own labels."""
    return [triggered(row, row.label) for row in dealt.test if row.label != target_of(config)]


def on_models(config: RunConfig, attackers: Collection[int], attack: Hostile, heard: Heard) -> Answers:
    """The run as `fedpeft simulate` does it."""
    strategy, dealt = strategy_of(config), deal_rows(config)

    def rows(partition: int) -> list[Row]:
        return poisoned(attack.rows if partition in attackers else "", dealt.sites[partition], config)

    def wrap(inner: Transport, state: Callable[[], ServerState]) -> Transport:
        return hostile(inner, strategy, attackers, attack.forge, state, heard)

    final = record(config, sites_with(config, rows), wrap).final.adapter
    right, wrong = (_labels_given(config, final, chosen) for chosen in (dealt.test, backdoored(dealt, config)))
    labels = np.array([config.task.chosen.labels.index(row.label) for row in dealt.test])
    target = config.task.chosen.labels.index(target_of(config))
    return Answers(int((right == labels).sum()), len(labels), int((wrong == target).sum()), len(wrong))


def _labels_given(config: RunConfig, adapter: AdapterState, rows: Sequence[Row]) -> np.ndarray:
    public = public_of(config)
    examples = public.task.encode(rows, public.adapted.tokenizer, "held-out rows")
    one_by_one = public.task._replace(figures=lambda statistics: dict(statistics))  # type: ignore[arg-type]
    install(public.adapted, adapter)
    found: np.ndarray = evaluate(public.adapted, one_by_one, examples, config.evaluation.batch_size)["predicted"]
    return found


class Kept:
    """What clients keep between rounds, in this process; see MemoryStore. No round is done twice here."""

    def __init__(self) -> None:
        self._kept: dict[int, Memory] = {}

    def load(self, run: str, partition: int, round_: int) -> Memory:  # noqa: ARG002
        """What the client kept last."""
        return self._kept.get(partition, Memory())

    def save(self, run: str, partition: int, round_: int, memory: Memory) -> None:  # noqa: ARG002
        """The client keeps this."""
        self._kept[partition] = memory


@dataclass
class FrozenFeatures:
    """A bench on frozen features, with a low-rank module of `rank`; texts that were read once are not read again."""

    rank: int = 8
    known: dict[str, np.ndarray] = field(default_factory=dict)

    def __call__(self, config: RunConfig, attackers: Collection[int], attack: Hostile, heard: Heard) -> Answers:
        """See Bench."""
        strategy, dealt, labels = strategy_of(config), deal_rows(config), config.task.chosen.labels
        held_out = self._read(config, [row.text for row in dealt.test])
        deviation = np.maximum(held_out.std(0), _LEAST_DEVIATION)
        spec = features.spec_of(held_out.shape[1], len(labels), self.rank)

        def features_of(rows: Sequence[Row]) -> Features:
            made = (self._read(config, [row.text for row in rows]) - held_out.mean(0)) / deviation
            return Features(made.astype(np.float32), np.array([labels.index(row.label) for row in rows]))

        def site(partition: int, rows: Sequence[Row]) -> Site:
            own = features_of(poisoned(attack.rows if partition in attackers else "", rows, config))
            settings = config.training
            learner = FeatureLearner(
                spec, own, settings.steps, settings.batch_size, settings.learning_rate, config.seed
            )
            return Site(partition, digest(config), strategy, learner)

        sites = [site(partition, rows) for partition, rows in enumerate(dealt.sites)]
        start = strategy.init("poisoning", config.seed, features.drawn_adapter(spec, config.seed))
        final = _merged(
            config,
            strategy,
            start,
            sites,
            lambda inner, now: hostile(inner, strategy, attackers, attack.forge, now, heard),
        )
        clean, doors = features_of(dealt.test), features_of(backdoored(dealt, config))
        given, led = (features.predicted(final.tensors, part.inputs) for part in (clean, doors))
        target = labels.index(target_of(config))
        return Answers(int((given == clean.labels).sum()), len(given), int((led == target).sum()), len(led))

    def _read(self, config: RunConfig, texts: Sequence[str]) -> np.ndarray:
        """What the base makes of the texts, `(texts, features)`."""
        new = list(dict.fromkeys(text for text in texts if text not in self.known))
        if new:
            self.known |= dict(zip(new, features.read_texts(config, new), strict=True))
        return np.stack([self.known[text] for text in texts])


def _merged(
    config: RunConfig, strategy: Strategy, start: ServerState, sites: Sequence[Site], wrap: Wrap
) -> AdapterState:
    """The final adapter of a federation of `sites`."""
    states = [start]
    transport = wrap(LocalTransport(len(sites), lambda partition: sites[partition], Kept()), lambda: states[-1])
    observer = rounds.Observer(lambda *_: None, lambda record, state: states.append(state))  # noqa: ARG005
    plan = plan_of(config, start.run, start.adapter.spec.digest)
    final, _ = rounds.run(strategy, plan, start, transport, _unscored, observer)
    return strategy.finalize(final)


def _unscored(adapter: AdapterState) -> rounds.Record:  # noqa: ARG001
    return {"loss": 0.0, "accuracy": 0.0, "macro_f1": 0.0, "rows": 0, "groups": {}}
