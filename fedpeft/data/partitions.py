"""How a simulation deals training rows out to its sites.

The rules are ours, not `flwr-datasets`': its 0.6.1 pins `datasets<5` and pulls the Hub's client back by a
major version (seen by a dry-run install beside the libraries used here), and each rule is a few lines.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import singledispatch
from typing import Any

import numpy as np

from fedpeft.config.data import ByGroup, ByLabel, BySize, Dirichlet, Iid, PartitionConfig
from fedpeft.data.fields import Row
from fedpeft.errors import DataError, sentence
from fedpeft.randomness import rng

MOST_DRAWS = 100


def deal(rows: Sequence[Row], config: PartitionConfig, sites: int, seed: int) -> tuple[tuple[int, ...], ...]:
    """For each site the ascending indices of its rows; no row is at two sites.

    Every row is at some site unless `config.most_rows` caps sites, which keeps a random choice of each.

    Raises:
        DataError: the rule cannot serve these rows and sites, or a site has fewer rows than `least_rows`.
    """
    dealt = _deal(config.by.chosen, _Task(rows, sites, seed, config.least_rows))
    kept = tuple(_capped(indices, config.most_rows, seed, site) for site, indices in enumerate(dealt))
    smallest = min(range(sites), key=lambda site: len(kept[site]))
    if len(kept[smallest]) < config.least_rows:
        raise DataError(
            sentence(
                f"data.partition.by.{config.by.name}",
                expected=f"at least {config.least_rows} rows at each of {sites} sites",
                found=f"{len(kept[smallest])} at site {smallest}",
                remedy="use fewer sites, a milder skew, more rows, or a lower data.partition.least_rows",
            )
        )
    return kept


def histogram(rows: Sequence[Row], indices: Sequence[int]) -> dict[str, Any]:
    """What one site holds: rows, rows of each label, and rows of each group (none if rows have none)."""
    labels = Counter(rows[index].label for index in indices if rows[index].label)
    groups = Counter(rows[index].group for index in indices if rows[index].group)
    return {"rows": len(indices), "labels": dict(sorted(labels.items())), "groups": dict(sorted(groups.items()))}


@dataclass(frozen=True)
class _Task:
    rows: Sequence[Row]
    sites: int
    seed: int
    least_rows: int

    def stream(self, attempt: int = 0) -> np.random.Generator:
        return rng(self.seed, "partition", attempt)


@singledispatch
def _deal(rule: object, _task: _Task) -> list[list[int]]:
    raise TypeError(f"no partition rule for {type(rule).__name__}")


@_deal.register
def _iid(_rule: Iid, task: _Task) -> list[list[int]]:
    return _evenly(list(range(len(task.rows))), task.sites, task.stream())


@_deal.register
def _dirichlet(rule: Dirichlet, task: _Task) -> list[list[int]]:
    """Drawn again, at most `MOST_DRAWS` times in all, while a site has fewer than `least_rows`.

    Source: Yurochkin et al., arXiv:1905.12022, experiments: proportions of each label over the sites. The
    bounded redraw is ours.
    """
    by_label = _by_labels(task.rows)
    for attempt in range(MOST_DRAWS):
        generator = task.stream(attempt)
        dealt: list[list[int]] = [[] for _ in range(task.sites)]
        for indices in by_label.values():
            bounds = np.cumsum(generator.dirichlet(np.full(task.sites, rule.alpha)))[:-1] * len(indices)
            parts = np.split(generator.permutation(indices), np.round(bounds).astype(int))
            for site, part in enumerate(parts):
                dealt[site] += part.tolist()
        if min(map(len, dealt)) >= task.least_rows:
            break
    return dealt


@_deal.register
def _by_label(rule: ByLabel, task: _Task) -> list[list[int]]:
    """Labels in a random order are handed round the sites, `labels_per_site` at a time."""
    by_label = _by_labels(task.rows)
    each = rule.labels_per_site
    if each > len(by_label) or each * task.sites < len(by_label):
        raise DataError(
            sentence(
                "data.partition.by.label.labels_per_site",
                expected=f"between {-(-len(by_label) // task.sites)} and {len(by_label)} for {task.sites} sites",
                found=f"{each} with {len(by_label)} labels",
                remedy="correct the value or the number of sites",
            )
        )
    generator = task.stream()
    names = list(by_label)
    order = [names[index] for index in generator.permutation(len(names))]
    holders: dict[str, list[int]] = defaultdict(list)
    for turn in range(task.sites * each):
        holders[order[turn % len(order)]].append(turn // each)
    return _among(by_label, holders, task.sites, generator)


@_deal.register
def _by_group(_rule: ByGroup, task: _Task) -> list[list[int]]:
    """Site i holds group i modulo the number of groups in sorted order; spare groups go round again."""
    by_group = _indices(task.rows, lambda row: row.group)
    if "" in by_group:
        raise DataError(
            sentence(
                "data.partition.by",
                expected="rows with a group",
                found="rows without one",
                remedy="set columns.group of the source, or choose another rule",
            )
        )
    names = list(by_group)
    holders: dict[str, list[int]] = defaultdict(list)
    for turn in range(max(task.sites, len(names))):
        holders[names[turn % len(names)]].append(turn % task.sites)
    return _among(by_group, holders, task.sites, task.stream())


@_deal.register
def _by_size(rule: BySize, task: _Task) -> list[list[int]]:
    """Site i is of rank i + 1, so the first is the largest."""
    shares = np.arange(1, task.sites + 1, dtype=float) ** -rule.exponent
    bounds = np.round(np.cumsum(shares / shares.sum())[:-1] * len(task.rows)).astype(int)
    order = task.stream().permutation(len(task.rows))
    return [part.tolist() for part in np.split(order, bounds)]


def _by_labels(rows: Sequence[Row]) -> dict[str, list[int]]:
    """The indices of each label's rows; refused where there are no labels."""
    found = _indices(rows, lambda row: row.label)
    if "" in found:
        raise DataError(
            sentence(
                "data.partition.by",
                expected="rows with a label",
                found="a task without labels",
                remedy="choose iid, group or size",
            )
        )
    return found


def _indices(rows: Sequence[Row], key: Callable[[Row], str]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = defaultdict(list)
    for index, row in enumerate(rows):
        found[key(row)].append(index)
    return dict(sorted(found.items()))


def _evenly(indices: Sequence[int], parts: int, generator: np.random.Generator) -> list[list[int]]:
    return [part.tolist() for part in np.array_split(generator.permutation(np.asarray(indices, dtype=int)), parts)]


def _among(
    members: Mapping[str, Sequence[int]],
    holders: Mapping[str, Sequence[int]],
    sites: int,
    generator: np.random.Generator,
) -> list[list[int]]:
    """The rows of each name, shuffled and shared evenly among the sites that hold the name."""
    dealt: list[list[int]] = [[] for _ in range(sites)]
    for name, indices in members.items():
        for site, part in zip(holders[name], _evenly(indices, len(holders[name]), generator), strict=True):
            dealt[site] += part
    return dealt


def _capped(indices: Sequence[int], most_rows: int, seed: int, site: int) -> tuple[int, ...]:
    if most_rows and len(indices) > most_rows:
        drawn = rng(seed, "cap", site).permutation(len(indices))[:most_rows]
        indices = [indices[index] for index in drawn]
    return tuple(sorted(indices))
