"""The membership game: rows that were trained on and rows that were not, in no order, and what may be trained anew."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedpeft.adapters import AdapterState
from fedpeft.client import FitJob
from fedpeft.config import RunConfig
from fedpeft.data.rows import Row, prepare
from fedpeft.errors import DataError, sentence
from fedpeft.experiment import deal_rows, site_examples, site_of, strategy_of
from fedpeft.randomness import rng
from simulations.privacy.recording import Recorded, record, require_views, sites_with
from simulations.privacy.views import ClientDelta, View


@dataclass(frozen=True)
class Game:
    """`candidates` of whom an adversary with `view` is to say which were trained on; `truth` is what it is not told.

    `public` rows are of the same source, and neither candidates nor anybody's.
    """

    view: View
    candidates: tuple[Row, ...]
    truth: np.ndarray
    public: tuple[Row, ...]


def game_of(config: RunConfig, recorded: Recorded, view: str, non_members: int) -> Game:
    """The game of a recorded run, with as many non-members as are asked for.

    Members are the rows that were in a batch; of a client, those of its own. Non-members have labels and groups in the
    proportions that members have them, as far as there are such rows.

    Raises:
        DataError: there are no non-members.
        PlanError: the run has no such view.
    """
    if view == "client":
        require_views(recorded.clients, view)
        chosen: View = recorded.clients[-1]
        partitions: Sequence[int] = [recorded.clients[-1].partition]
    else:
        chosen, partitions = recorded.final, range(config.federation.clients)
    dealt = deal_rows(config)
    seen = {example for batch in recorded.batches.values() for example in batch}
    members = [
        row
        for partition in partitions
        for row, example in zip(dealt.sites[partition], site_examples(config, partition), strict=True)
        if example in seen
    ]
    used = {row.text for site in dealt.sites for row in site} | {row.text for row in dealt.server}
    split = prepare(config.data, config.seed, config.task.chosen.roles)
    pool = [row for row in (*split.train, *split.test) if row.text not in used]
    others = alike(members, pool, non_members, config.seed)
    if not others or not members:
        raise DataError(
            sentence(
                "membership",
                expected="rows that were trained on, and rows that were not",
                found=f"{len(members)} and {len(others)}",
                remedy="leave rows over with data.partition.most_rows, or hold out more with data.test_fraction",
            )
        )
    taken = {row.text for row in others}
    public = tuple(row for row in pool if row.text not in taken)
    candidates = [*members, *others]
    order = rng(config.seed, "candidates").permutation(len(candidates))
    return Game(chosen, tuple(candidates[at] for at in order), order < len(members), public)


def alike(rows: Sequence[Row], pool: Sequence[Row], most: int, seed: int) -> list[Row]:
    """Up to `most` rows of `pool`, of labels and groups in the proportions of `rows`."""
    strata: dict[tuple[str, str], list[Row]] = {}
    for at in rng(seed, "non-members").permutation(len(pool)):
        strata.setdefault((pool[at].label, pool[at].group), []).append(pool[at])
    shares: dict[tuple[str, str], int] = {}
    for row in rows:
        shares[row.label, row.group] = shares.get((row.label, row.group), 0) + 1
    if not all(key in strata for key in shares):
        return []
    factor = min([most / max(1, len(rows)), *(len(strata[key]) / count for key, count in shares.items())])
    return [row for key, count in shares.items() for row in strata[key][: int(factor * count)]]


def trained_on(game: Game, config: RunConfig, rows: Sequence[Row]) -> AdapterState:
    """The adapter that comes of other rows in the way that the view's came about.

    Of a client, one fit from what it received; else a federation, its sites of the sizes that they had.
    """
    if isinstance(game.view, ClientDelta):
        return _fitted(game.view, config, rows)
    sizes = [len(site) for site in deal_rows(config).sites]
    bounds = np.round(np.cumsum([0, *sizes]) / sum(sizes) * len(rows)).astype(int)
    return record(config, sites_with(config, lambda p: rows[bounds[p] : bounds[p + 1]])).final.adapter


def _fitted(view: ClientDelta, config: RunConfig, rows: Sequence[Row]) -> AdapterState:
    site = site_of(config, view.partition, own_rows=lambda _: rows)
    frozen = strategy_of(config).stage.frozen(view.received.spec, view.round)
    fitted = site.learner.fit(view.received, FitJob(view.round, view.partition, frozen, position=0))
    return AdapterState(view.received.spec, fitted.after, view.received.residual)
