import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from fedpeft.config.data import SOURCES, Columns, Csv, DataConfig, Hub, JsonLines, Parquet
from fedpeft.config.fields import choose
from fedpeft.data.fields import Row
from fedpeft.data.partitions import histogram
from fedpeft.data.rows import prepare
from fedpeft.data.sources import read
from fedpeft.errors import DataError

TURNS = [{"role": "user", "content": "good"}, {"role": "assistant", "content": "yes"}]


def put(path: Path, *records: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


@pytest.mark.parametrize(
    ("roles", "record", "expected"),
    [
        (("text", "answer"), {"text": "a", "answer": 4}, Row("a", fields={"answer": "4"})),
        (("text", "label"), {"text": "a", "label": "x", "answer": 4}, Row("a", "x")),
        (
            ("text", "chosen", "rejected"),
            {"text": "a", "chosen": " b ", "rejected": "c"},
            Row("a", fields={"chosen": "b", "rejected": "c"}),
        ),
        (
            ("words", "tags"),
            {"words": ["a", "b"], "tags": ["O", "B-x"]},
            Row("a b", fields={"words": ("a", "b"), "tags": ("O", "B-x")}),
        ),
        (("words", "tags"), {"words": "a", "tags": "O"}, Row("a", fields={"words": ("a",), "tags": ("O",)})),
        (
            ("messages",),
            {"messages": TURNS},
            Row("user: good", fields={"messages": (("user", "good"), ("assistant", "yes"))}),
        ),
    ],
)  # fmt: skip
def test_a_row_has_the_fields_of_its_roles(
    roles: tuple[str, ...], record: dict[str, Any], expected: Row, tmp_path: Path
) -> None:
    assert read(JsonLines(put(tmp_path / "a.jsonl", record)), roles) == [expected]
    assert hash(expected) == hash(Row(expected.text, expected.label))


def test_columns_of_any_role_may_have_other_names(tmp_path: Path) -> None:
    name = put(tmp_path / "a.jsonl", {"question": "a", "reply": "b", "topic": "x"})
    columns = Columns(text="question", answer="reply", group="topic")
    assert read(JsonLines(name, columns), ("text", "answer")) == [Row("a", "", "x", {"answer": "b"})]


def test_words_in_a_table_are_apart_by_white_space_and_in_a_data_set_by_list(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("words,tags\ngood film,O B-x\n")
    expected = [Row("good film", fields={"words": ("good", "film"), "tags": ("O", "B-x")})]
    assert read(Csv(str(tmp_path / "a.csv")), ("words", "tags")) == expected
    tags = datasets.List(datasets.ClassLabel(names=["O", "B-x"]))
    features = datasets.Features({"words": datasets.List(datasets.Value("string")), "tags": tags})
    table = datasets.Dataset.from_dict({"words": [["good", "film"]], "tags": [[0, 1]]}, features=features)
    (tmp_path / "set").mkdir()
    table.to_parquet(str(tmp_path / "set" / "train.parquet"))
    assert read(Hub(str(tmp_path / "set")), ("words", "tags")) == expected
    plain = Row("good film", fields={"words": ("good", "film"), "tags": ("0", "1")})
    assert read(Parquet(str(tmp_path / "set")), ("words", "tags")) == [plain]


@pytest.mark.parametrize(
    ("roles", "record", "said"),
    [
        (("text", "answer"), {"text": "a", "label": "b"}, r"a\.jsonl:1: .* a column 'answer', .*set columns\.answer"),
        (("text", "answer"), {"text": "a", "answer": ""}, r"a\.jsonl:1: .* text in column 'answer', found nothing"),
        (("words",), {"words": []}, "expected a list of texts in column 'words', found nothing"),
        (("words",), {"words": {"a": 1}}, "expected a list of texts in column 'words', found a dict"),
        (("words",), {"words": ["a", ""]}, "expected text in column 'words', found nothing"),
        (("messages",), {"messages": "hello"}, "expected a list of objects with role and content .*, found a str"),
        (("messages",), {"messages": [{"role": "user"}]}, "expected a list of objects with role and content"),
        (("messages",), {"messages": [{"role": "user", "content": None}]}, "expected text in column 'messages'"),
    ],
)  # fmt: skip
def test_a_field_that_cannot_be_used_is_named(
    roles: tuple[str, ...], record: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=said):
        read(JsonLines(put(tmp_path / "a.jsonl", record)), roles)


def test_rows_of_one_first_role_are_repeats_and_no_label_is_one_stratum(tmp_path: Path) -> None:
    records = [{"text": f"text {at % 20}", "answer": f"{at}"} for at in range(30)]
    origin = choose(SOURCES, "jsonl", jsonl=JsonLines(put(tmp_path / "a.jsonl", *records)))
    found = prepare(DataConfig(origin=origin, test_fraction=0.25), 0, ("text", "answer"))
    assert (found.report.repeats_removed, found.report.train_rows, found.report.test_rows) == (10, 15, 5)
    assert {row.fields["answer"] for row in (*found.train, *found.test)} == {str(at) for at in range(20)}
    assert histogram(found.train, (0, 1)) == {"rows": 2, "labels": {}, "groups": {}}
