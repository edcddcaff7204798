"""Rows without repeats, split once into training and held-out rows."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from fedpeft.config.data import DataConfig
from fedpeft.data.fields import TEXT_AND_LABEL, Row
from fedpeft.data.sources import read
from fedpeft.errors import DataError, sentence
from fedpeft.randomness import rng

__all__ = ["DataReport", "Row", "Split", "normalise", "overlap", "prepare", "split", "without_repeats"]


@dataclass(frozen=True)
class DataReport:
    """What became of a source's rows: rows = repeats_removed + train_rows + test_rows + server_rows.

    `test_overlap` is the share of test rows whose normalised text also stands in training.
    """

    rows: int
    repeats_removed: int
    train_rows: int
    test_rows: int
    test_overlap: float
    server_rows: int = 0


@dataclass(frozen=True)
class Split:
    """Training rows, held-out rows and rows of the server's own, each in the order of their source."""

    train: tuple[Row, ...]
    test: tuple[Row, ...]
    report: DataReport
    server: tuple[Row, ...] = ()


def prepare(config: DataConfig, seed: int, roles: Sequence[str] = TEXT_AND_LABEL) -> Split:
    """The source's rows, with the fields of `roles`, repeats removed before anything is held out.

    The same seed gives the same rows.

    Raises:
        DataError: the source cannot be read, or has too few rows to hold any out.
        AssetError: a bundled data set is not in the cache.
    """
    rows = read(config.origin.chosen, roles)
    distinct = without_repeats(rows)
    train, test = split(distinct, config.test_fraction, config.most_test_rows, seed)
    if not test:
        raise DataError(
            sentence(
                "data.test_fraction",
                expected="rows to hold out, with as many again of the same group and label to train on",
                found=f"{config.test_fraction} of {len(distinct)} distinct rows, which holds out none",
                remedy="give more rows or a larger fraction",
            )
        )
    train, server = set_aside(train, config.server_rows, seed)
    repeats = len(rows) - len(distinct)
    report = DataReport(len(rows), repeats, len(train), len(test), overlap(train, test), len(server))
    return Split(train, test, report, server)


def normalise(text: str) -> str:
    """The text as it is compared with others: case folded, each run of white space one space."""
    return " ".join(text.casefold().split())


def without_repeats(rows: Iterable[Row]) -> tuple[Row, ...]:
    """The first row of each normalised text, in order; a later one with another label goes too."""
    first: dict[str, Row] = {}
    for row in rows:
        first.setdefault(normalise(row.text), row)
    return tuple(first.values())


def overlap(train: Iterable[Row], test: Sequence[Row]) -> float:
    """Share of `test` in [0, 1] whose normalised text also stands in `train`."""
    seen = {normalise(row.text) for row in train}
    return sum(normalise(row.text) in seen for row in test) / len(test) if test else 0.0


def split(
    rows: Sequence[Row], test_fraction: float, most_test_rows: int, seed: int
) -> tuple[tuple[Row, ...], tuple[Row, ...]]:
    """Training rows and test rows, each in the order of `rows`.

    Of each group `test_fraction` is held out, at most `most_test_rows` (0: no bound), its labels in the
    proportions that the group has them. One row of each label of a group always stays in training.
    """
    strata: dict[tuple[str, str], list[int]] = defaultdict(list)
    for index, row in enumerate(rows):
        strata[row.group, row.label].append(index)
    held: set[int] = set()
    for group in sorted({group for group, _ in strata}):
        counts = {label: len(members) for (name, label), members in sorted(strata.items()) if name == group}
        wanted = round(test_fraction * sum(counts.values()))
        quotas = _quotas(counts, min(wanted, most_test_rows) if most_test_rows else wanted)
        for label, quota in quotas.items():
            members = strata[group, label]
            drawn = rng(seed, "test", group, label).permutation(len(members))[:quota]
            held.update(members[index] for index in drawn)
    train = tuple(row for index, row in enumerate(rows) if index not in held)
    return train, tuple(row for index, row in enumerate(rows) if index in held)


def set_aside(rows: Sequence[Row], count: int, seed: int) -> tuple[tuple[Row, ...], tuple[Row, ...]]:
    """`rows` without `count` of them, and those.

    Raises:
        DataError: that is more than half of them.
    """
    if 2 * count > len(rows):
        raise DataError(
            sentence(
                "data.server_rows",
                expected=f"at most half of {len(rows)} training rows",
                found=count,
                remedy="lower it, or give more rows",
            )
        )
    taken = set(rng(seed, "server").permutation(len(rows))[:count].tolist())
    kept = tuple(row for index, row in enumerate(rows) if index not in taken)
    return kept, tuple(row for index, row in enumerate(rows) if index in taken)


def _quotas(counts: Mapping[str, int], total: int) -> dict[str, int]:
    """`total` shared out in proportion to `counts` by largest remainder, leaving one of each count."""
    exact = {label: total * count / sum(counts.values()) for label, count in counts.items()}
    quotas = Counter({label: min(int(exact[label]), counts[label] - 1) for label in counts})
    by_remainder = sorted(counts, key=lambda label: (int(exact[label]) - exact[label], label))
    for label in by_remainder:
        if quotas.total() < total and quotas[label] < counts[label] - 1:
            quotas[label] += 1
    return dict(quotas)
