"""Membership inference: which of some rows were trained on, out of an adapter.

Each way is a function of what is known of the rows one by one under models that the adversary has:

- `threshold`: the surer the adapter is of a row, the likelier a member. Source: Yeom et al. 2018, "Privacy Risk in
  Machine Learning", adversary 1.
- `reference`: how much surer it is than the public base with the adapter as it was drawn. Source: Watson et al. 2022,
  "On the Importance of Difficulty Calibration in Membership Inference Attacks", eq. 3; with the base itself, Carlini
  et al. 2021, "Extracting Training Data from Large Language Models", section 5.
- `lira_offline` and `lira_online`: how likely that is under adapters trained without the row, and, online, under those
  trained with it. Source: Carlini et al. 2022, "Membership Inference Attacks From First Principles", algorithm 1 and
  section IV-C; with one variance for all rows (section VI-C), as there are few shadows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from fedpeft.adapters import AdapterState
from fedpeft.config import RunConfig
from fedpeft.config.fields import require, require_range
from fedpeft.data.rows import Row
from fedpeft.evaluation import evaluate
from fedpeft.models import install
from fedpeft.randomness import rng
from fedpeft.tasks import Statistics
from simulations.privacy import figures
from simulations.privacy.findings import Finding, exactly, found
from simulations.privacy.game import Game, game_of, trained_on
from simulations.privacy.recording import public_of, record, require_views
from simulations.privacy.views import Public, View

FALSE_POSITIVES = (1e-3, 1e-2)
"""The shares of non-members that may be taken for members, at which the share of members found is told."""

_LEAST_LOSS = 1e-12
_GUESSED = 0.25
"""The share of rows that are guessed to be members, and to be none, where guesses are counted."""


class Known(NamedTuple):
    """What an adversary knows of the rows, one by one: how sure the adapter and other models are, `(rows,)` each.

    `reference` is that of the public base; `out` and `inside` are `(shadows, rows)` of shadows that were trained
    without and with the row, NaN where it was otherwise.
    """

    target: np.ndarray
    reference: np.ndarray
    out: np.ndarray
    inside: np.ndarray


def threshold(known: Known) -> np.ndarray:
    """The score of each row by itself."""
    return known.target


def reference(known: Known) -> np.ndarray:
    """The score of each row over that of the public base."""
    found: np.ndarray = known.target - known.reference
    return found


def lira_offline(known: Known) -> np.ndarray:
    """How far each row is above the shadows that lack it, in standard deviations."""
    means = np.nanmean(known.out, axis=0)
    found: np.ndarray = (known.target - means) / _deviation(known.out, means)
    return found


def lira_online(known: Known) -> np.ndarray:
    """The log likelihood ratio of shadows with and without each row.

    A row that no shadow was trained with is taken to be as far above the others as the mean of those that some had.
    """
    means = np.nanmean(known.out, axis=0)
    had = np.isfinite(known.inside).any(axis=0)
    with_it = np.full(len(means), np.nan)
    with_it[had] = np.nanmean(known.inside[:, had], axis=0)
    with_it = np.where(had, with_it, means + np.mean(with_it[had] - means[had]))
    spread_in, spread_out = _deviation(known.inside, with_it), _deviation(known.out, means)
    near_in, near_out = (known.target - with_it) / spread_in, (known.target - means) / spread_out
    found: np.ndarray = (near_out**2 - near_in**2) / 2 + np.log(spread_out / spread_in)
    return found


def _deviation(values: np.ndarray, means: np.ndarray) -> float:
    """One standard deviation for all rows, of `(shadows, rows)` about their means."""
    counted = np.isfinite(values)
    free = counted.sum() - counted.any(axis=0).sum()
    squares = np.nansum((values - means) ** 2)
    return float(np.sqrt(squares / free)) if free > 0 and squares > 0 else 1.0


class Way(NamedTuple):
    """A score of rows, and whether shadows are trained on candidates (True), on public rows (False), or not at all."""

    score: Callable[[Known], np.ndarray]
    shadows: str = ""


WAYS: Mapping[str, Way] = {
    "threshold": Way(threshold),
    "reference": Way(reference),
    "lira_offline": Way(lira_offline, "public"),
    "lira_online": Way(lira_online, "candidates"),
}
"""Every way to tell members, and the rows that its shadows are trained on, if it has any."""


@dataclass(frozen=True)
class Membership:
    """What is attacked, how, and by how much it is judged.

    `view` is `final`, or `client` for the last update of a client, whose rows are then the members. Of rows that
    nobody trained on, `non_members` are to be told from the members; the others are public. Each of the `shadows` is
    trained as the adapter was, a whole federation for `final`, one client's fit for `client`. The ε that an attack
    proves is that of one row more or less, at the run's δ or, where it has none, at `delta`; an ε that is promised to
    clients, who may be there or not, allows a row twice that, since a client with another row is another client.
    """

    view: str = "final"
    ways: tuple[str, ...] = ("threshold", "reference", "lira_offline")
    shadows: int = 4
    non_members: int = 2000
    delta: float = 1e-5

    def __post_init__(self) -> None:
        require(self.view in ("final", "client"), "view", expected="final or client", found=self.view)
        require(set(self.ways) <= set(WAYS), "ways", expected=f"some of {', '.join(WAYS)}", found=self.ways)
        require_range(self, "shadows", 2)
        require_range(self, "non_members", 2)
        require_range(self, "delta", 0.0, 1.0)

    @property
    def adversary(self) -> str:
        """What the attacker has, in words."""
        return {"final": "the final adapter", "client": "one client's delta"}[self.view]

    def run(self, config: RunConfig) -> list[Finding]:
        """What is found in a run of `config`.

        Raises:
            FedPeftError: the run failed, or has no such view.
        """
        recorded = record(config)
        game = game_of(config, recorded, self.view, self.non_members)
        delta = getattr(config.privacy.chosen, "delta", 0.0) or self.delta
        public, results = public_of(config, game.public), accounted(recorded.journal, self.adversary, delta)
        known = _known(game.view, public, game, config)
        for kind in {WAYS[name].shadows: None for name in self.ways}:
            of_kind = _with_shadows(known, game, config, kind, self.shadows) if kind else known
            for name in self.ways:
                if WAYS[name].shadows == kind:
                    scores = WAYS[name].score(of_kind)
                    results += judged(f"membership, {name}", self.adversary, scores, game.truth, delta)
        return results


def accounted(journal: Sequence[Mapping[str, Any]], adversary: str, delta: float) -> list[Finding]:
    """The ε that the run's own account came to, beside which stands what is proved; nothing where none was promised."""
    rounds = [record for record in journal if record["event"] == "round" and record.get("epsilon") is not None]
    metric = f"ε accounted at δ = {delta:.3g}"
    return [exactly("membership", adversary, metric, one["epsilon"], len(rounds)) for one in rounds[-1:]]


def judged(attack: str, adversary: str, scores: np.ndarray, truth: np.ndarray, delta: float) -> list[Finding]:
    """What scores `(rows,)` come to beside the truth `(rows,)`, True for members; rows are in no order."""
    members, others = scores[truth], scores[~truth]
    most = min(len(members), len(others))
    results = [found(attack, adversary, "AUC", figures.auc(members, others), len(scores))]
    for allowed in FALSE_POSITIVES:
        hits = figures.rates_above(members, others, figures.threshold_at(others, allowed))
        interval = figures.rate(hits.true_positives, hits.members)
        results.append(found(attack, adversary, f"members found at {100 * allowed:g} % false", interval, len(members)))
    proved = figures.epsilon_of_scores(members, others, delta)
    results.append(exactly(attack, adversary, f"ε proved at δ = {delta:.3g}", proved, len(scores)))
    right, guesses = guessed(members[:most], others[:most])
    counted = figures.epsilon_of_guesses(right, guesses, 2 * most, delta)
    return [
        *results,
        exactly(attack, adversary, f"ε proved at δ = {delta:.3g}, by guesses of one run", counted, guesses),
    ]


def guessed(members: np.ndarray, others: np.ndarray) -> tuple[int, int]:
    """How many guesses are right, and how many there are: the surest are taken for members, the least sure for none."""
    scores, truth = np.concatenate([members, others]), np.arange(len(members) + len(others)) < len(members)
    order, count = np.argsort(-scores, kind="stable"), int(_GUESSED * len(scores))
    if not count:
        return 0, 0
    return int(truth[order[:count]].sum() + (~truth[order[-count:]]).sum()), 2 * count


def sureness(statistics: Statistics) -> np.ndarray:
    """How sure a model is of each row, `(rows,)`: of an answer the mean log-likelihood, of a label its log-odds.

    Source for the log-odds: Carlini et al. 2022, section IV-C, which are near normal.
    """
    loss = np.asarray(statistics["loss"], np.float64)
    if "tokens" in statistics:
        found: np.ndarray = -loss / np.maximum(statistics["tokens"], 1)
        return found
    loss = np.maximum(loss, _LEAST_LOSS)
    return np.asarray(-loss - np.log(-np.expm1(-loss)))


def sure(adapter: AdapterState, public: Public, rows: Sequence[Row], batch_size: int) -> np.ndarray:
    """How sure the base is of each of `rows` with `adapter` on it."""
    examples = public.task.encode(rows, public.adapted.tokenizer, "candidates")
    one_by_one = public.task._replace(figures=lambda statistics: dict(statistics))  # type: ignore[arg-type]
    install(public.adapted, adapter)
    return sureness(evaluate(public.adapted, one_by_one, examples, batch_size))


def _known(view: View, public: Public, game: Game, config: RunConfig) -> Known:
    """What is known without shadows."""
    size = config.evaluation.batch_size
    none = np.full((0, len(game.candidates)), np.nan)
    target = sure(view.adapter, public, game.candidates, size)
    return Known(target, sure(public.adapted.initial, public, game.candidates, size), none, none)


def _with_shadows(known: Known, game: Game, config: RunConfig, kind: str, shadows: int) -> Known:
    """What is known with shadows, each trained on as many rows as there are members, public ones or candidates."""
    pool = {"public": game.public, "candidates": game.candidates}[kind]
    require_views(pool, f"of {kind} rows")
    size, public = int(game.truth.sum()), public_of(config)
    found = np.full((2, shadows, len(game.candidates)), np.nan)
    for shadow in range(shadows):
        drawn = rng(config.seed, "shadow", kind, shadow).permutation(len(pool))[:size]
        adapter = trained_on(game, config, [pool[at] for at in drawn])
        levels = sure(adapter, public, game.candidates, config.evaluation.batch_size)
        inside = np.isin(np.arange(len(game.candidates)), drawn) & (kind == "candidates")
        found[0, shadow, ~inside], found[1, shadow, inside] = levels[~inside], levels[inside]
    return known._replace(out=found[0], inside=found[1])
