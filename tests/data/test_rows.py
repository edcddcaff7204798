import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.config.data import SOURCES, Columns, DataConfig, JsonLines
from fedpeft.config.fields import choose
from fedpeft.data.rows import DataReport, Row, normalise, overlap, prepare, split, without_repeats
from fedpeft.errors import DataError

labels = st.sampled_from(["no", "maybe", "yes"])
groups = st.sampled_from(["", "films", "shops"])
some_rows = st.lists(st.builds(Row, st.text(min_size=1, max_size=4), labels, groups), max_size=60)
fractions = st.floats(0.01, 0.99)


def config(path: Path, **settings: float) -> DataConfig:
    origin = choose(SOURCES, "jsonl", jsonl=JsonLines(str(path), Columns(group="kind")))
    return DataConfig(origin=origin, **settings)


def write(path: Path, rows: list[tuple[str, str, str]]) -> Path:
    path.write_text("".join(json.dumps({"text": t, "label": n, "kind": k}) + "\n" for t, n, k in rows))
    return path


@given(some_rows)
def test_no_normalised_text_is_left_twice(rows: list[Row]) -> None:
    kept = without_repeats(rows)
    texts = [normalise(row.text) for row in kept]
    assert len(texts) == len(set(texts))
    assert set(texts) == {normalise(row.text) for row in rows}
    assert without_repeats(kept) == kept


@given(some_rows, fractions, st.integers(0, 5), st.integers(0, 9))
def test_a_split_keeps_every_row_once_in_order(rows: list[Row], fraction: float, most: int, seed: int) -> None:
    distinct = without_repeats(rows)
    train, test = split(distinct, fraction, most, seed)
    assert Counter(train) + Counter(test) == Counter(distinct)
    for part in (train, test):
        positions = [distinct.index(row) for row in part]
        assert positions == sorted(positions)
    assert overlap(train, test) == 0
    assert (train, test) == split(distinct, fraction, most, seed)


@given(some_rows, fractions, st.integers(0, 5))
def test_each_group_gives_its_fraction_and_keeps_every_label(rows: list[Row], fraction: float, most: int) -> None:
    train, test = split(rows, fraction, most, 0)
    assert {(row.group, row.label) for row in rows} == {(row.group, row.label) for row in train}
    for group in {row.group for row in rows}:
        of_group = [row for row in rows if row.group == group]
        wanted = round(fraction * len(of_group))
        spare = len(of_group) - len({row.label for row in of_group})
        assert sum(row.group == group for row in test) <= min(wanted, spare, most or wanted)


def test_labels_are_held_out_in_their_proportions() -> None:
    rows = [
        Row(f"{label} {index}", label) for label, count in (("a", 60), ("b", 30), ("c", 10)) for index in range(count)
    ]
    _, test = split(rows, 0.2, 0, 1)
    assert Counter(row.label for row in test) == {"a": 12, "b": 6, "c": 2}
    _, capped = split(rows, 0.2, 10, 1)
    assert Counter(row.label for row in capped) == {"a": 6, "b": 3, "c": 1}


def test_another_seed_holds_out_other_rows() -> None:
    rows = [Row(str(index), "a") for index in range(100)]
    assert split(rows, 0.2, 0, 1) != split(rows, 0.2, 0, 2)


def test_overlap_counts_test_rows_that_stand_in_training() -> None:
    train = [Row("Good  film", "yes"), Row("bad", "no")]
    test = [Row("good film", "yes"), Row("so", "no"), Row("new", "no"), Row("newer", "no")]
    assert overlap(train, test) == 0.25
    assert overlap(train, []) == 0.0


def test_repeats_go_before_the_split_and_are_counted(tmp_path: Path) -> None:
    rows = [(f"sentence {index}", "yes" if index % 2 else "no", "films") for index in range(40)]
    rows += [(f"  SENTENCE   {index} ", "no", "shops") for index in range(10)]
    prepared = prepare(config(write(tmp_path / "rows.jsonl", rows), test_fraction=0.25), seed=3)
    assert prepared.report == DataReport(rows=50, repeats_removed=10, train_rows=30, test_rows=10, test_overlap=0.0)
    assert {row.group for row in prepared.train} == {"films"}
    assert len(prepared.train) == 30


def test_too_few_rows_to_hold_any_out_is_one_sentence(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [("one", "yes", "a"), ("two", "no", "a")])
    with pytest.raises(DataError, match="holds out none"):
        prepare(config(path, test_fraction=0.4), seed=0)
