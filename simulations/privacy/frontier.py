"""What the privacy frontier measures of each finished run (see `simulations/privacy/frontier.toml`).

The unit that central noise protects is a client, so the audit is of clients: those of the federation against others
that were dealt rows of the same kind in the same way, and took no part. An adversary with the released adapter scores
each client by its rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedpeft import checkpoint
from fedpeft.config import RunConfig
from fedpeft.data.rows import Row, prepare
from fedpeft.errors import DataError, sentence
from fedpeft.experiment import deal_rows, strategy_of
from fedpeft.randomness import rng
from fedpeft.runs import reopen
from simulations.privacy import figures
from simulations.privacy.findings import Finding
from simulations.privacy.inversion import Inversion
from simulations.privacy.membership import sure
from simulations.privacy.recording import public_of
from simulations.privacy.views import FinalAdapter

MOST_OTHERS = 4
"""As many clients that took no part are dealt, for each that did."""

_UPDATES = 3
"""As many updates of a run are inverted."""

DELTA = 1e-3
"""δ at which an ε is proved where the run promises none."""


def membership(folder: Path) -> Mapping[str, Any]:
    """Who took part, told from the released adapter by calibration with the public base.

    `scores` and `other_scores` are those of clients, a mean over their rows; the areas under the curve are of clients
    and of single rows.
    """
    run, config = reopen(folder, [])
    strategy, state = strategy_of(config), checkpoint.load(run.checkpoint)
    adapter, public = FinalAdapter(strategy.finalize(state)).adapter, public_of(config)
    sites = [list(site) for site in deal_rows(config).sites if site]
    others = outsiders(config, sites)
    rows = [row for site in (*sites, *others) for row in site]
    size = config.evaluation.batch_size
    levels = sure(adapter, public, rows, size) - sure(public.adapted.initial, public, rows, size)
    members, apart = sum(map(len, sites)), np.cumsum([len(site) for site in (*sites, *others)])[:-1]
    clients = np.array([float(one.mean()) for one in np.split(levels, apart)])
    inside, outside = clients[: len(sites)], clients[len(sites) :]
    return {
        "client_auc": figures.auc(inside, outside).value,
        "row_auc": figures.auc(levels[:members], levels[members:]).value,
        "scores": inside.tolist(),
        "other_scores": outside.tolist(),
        "delta": getattr(config.privacy.chosen, "delta", 0.0) or DELTA,
    }


def outsiders(config: RunConfig, sites: Sequence[Sequence[Row]]) -> list[list[Row]]:
    """Clients that took no part, of rows that nobody has, of the sizes of those that did, in a random order.

    Raises:
        DataError: nobody's rows are too few.
    """
    dealt = deal_rows(config)
    used = {row.text for site in dealt.sites for row in site} | {row.text for row in dealt.server}
    split = prepare(config.data, config.seed, config.task.chosen.roles)
    pool = [row for row in split.train if row.text not in used]
    order = rng(config.seed, "outsiders").permutation(len(pool)).tolist()
    made: list[list[Row]] = []
    while len(made) < MOST_OTHERS * len(sites):
        count = len(sites[len(made) % len(sites)])
        if count > len(order):
            break
        made.append([pool[at] for at in order[:count]])
        order = order[count:]
    if len(made) < len(sites):
        remedy = "leave rows over with data.partition.most_rows"
        raise DataError(
            sentence("audit", expected=f"rows for {len(sites)} other clients", found=str(len(made)), remedy=remedy)
        )
    return made


def inversion(folder: Path) -> Mapping[str, Any]:
    """The words of batches, out of what the server sees: each update, or the sum of a round where sums are secure."""
    config = reopen(folder, [])[1]
    secure = config.federation.channel.name == "secure"
    asked = Inversion(view="aggregate", most=_UPDATES) if secure else Inversion(most=_UPDATES)
    return recovered(asked.run(config))


def strongest_inversion(folder: Path) -> Mapping[str, Any]:
    """The same of one plain gradient step, the most that an update could give away."""
    return recovered(Inversion(update="gradient", most=_UPDATES).run(reopen(folder, [])[1]))


def recovered(findings: Sequence[Finding]) -> Mapping[str, Any]:
    """The share of words found, with its interval, and how many there were beside the rank."""
    by_metric = {one.metric: one for one in findings}
    share = next(one for metric, one in by_metric.items() if metric.startswith("words found, "))
    load = by_metric["distinct words over rank"]
    return {
        "recovered": share.value,
        "recovered_low": share.low,
        "recovered_high": share.high,
        "words": share.n,
        "words_over_rank": load.value,
    }
