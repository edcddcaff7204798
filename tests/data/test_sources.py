import subprocess
import sys
from pathlib import Path

import datasets
import pytest

from fedpeft.config.data import Bundled, Columns, Csv, Hub, JsonLines, Parquet
from fedpeft.data.sources import Row, read
from fedpeft.errors import AssetError, DataError


def put(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.fixture
def table() -> datasets.Dataset:
    features = datasets.Features({"body": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    return datasets.Dataset.from_dict({"body": ["good", "bad"], "label": [1, 0]}, features=features)


@pytest.fixture
def parquet(table: datasets.Dataset, tmp_path: Path) -> Path:
    table.to_parquet(str(tmp_path / "train.parquet"))
    return tmp_path


def test_json_lines_are_stripped_and_blank_lines_pass(tmp_path: Path) -> None:
    name = put(
        tmp_path / "a.jsonl", '\ufeff{"text": " good ", "label": 1}\n\n{"text": "bad", "label": "no", "more": []}\n'
    )
    assert read(JsonLines(name)) == [Row("good", "1"), Row("bad", "no")]


def test_columns_may_have_other_names(tmp_path: Path) -> None:
    name = put(tmp_path / "a.jsonl", '{"body": "good", "stars": 4.5, "shop": "x"}\n')
    assert read(JsonLines(name, Columns("body", "stars", "shop"))) == [Row("good", "4.5", "x")]


def test_csv_fields_may_be_quoted_and_hold_line_ends(tmp_path: Path) -> None:
    name = put(tmp_path / "a.csv", 'text,label\n"good, or\nso",yes\nbad,no\n')
    assert read(Csv(name)) == [Row("good, or\nso", "yes"), Row("bad", "no")]


def test_csv_may_have_another_delimiter(tmp_path: Path) -> None:
    name = put(tmp_path / "a.tsv", "label\ttext\nyes\tgood, really\n")
    assert read(Csv(name, delimiter="\t")) == [Row("good, really", "yes")]


def test_a_folder_and_a_glob_are_read_in_order_of_name(tmp_path: Path) -> None:
    for stem in ("b", "a"):
        put(tmp_path / f"{stem}.jsonl", f'{{"text": "{stem}", "label": "x"}}\n')
    put(tmp_path / "notes.txt", "not rows")
    both = [Row("a", "x"), Row("b", "x")]
    assert read(JsonLines(str(tmp_path))) == both
    assert read(JsonLines(str(tmp_path / "*.jsonl"))) == both
    assert read(JsonLines(str(tmp_path / "b.*"))) == both[1:]


def test_parquet_is_read(parquet: Path) -> None:
    assert read(Parquet(str(parquet), Columns(text="body"))) == [Row("good", "1"), Row("bad", "0")]


def test_a_hub_folder_is_read_with_the_names_of_its_classes(parquet: Path) -> None:
    assert read(Hub(str(parquet), columns=Columns(text="body"))) == [Row("good", "yes"), Row("bad", "no")]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"text": "a", "label": "x"}\n{"text": \n', r"a\.jsonl:2: expected one JSON object, found .*; correct"),
        ('{"text": "a", "label": "x"}\n[1]\n', r"a\.jsonl:2: expected one JSON object, found list"),
        ('{"text": "a", "lable": "x"}\n', r"a\.jsonl:1: expected a column 'label', found text, lable, nearest 'lable'"),
        ('{"text": "a", "label": "x"}\n{"text": " ", "label": "x"}\n', r"a\.jsonl:2: .*column 'text', found nothing"),
        ('{"text": "a", "label": null}\n', r"a\.jsonl:1: .*column 'label', found nothing"),
        ('{"text": ["a"], "label": "x"}\n', r"a\.jsonl:1: .*column 'text', found a list"),
        ('{"text": "a", "label": NaN}\n', r"a\.jsonl:1: .*column 'label', found a float"),
        ('{"text": "a\\ud800", "label": "x"}\n', r"a\.jsonl:1: .*surrogate"),
        ("{}\n", r"a\.jsonl:1: .*found no columns"),
        ("\n\n", r"a\.jsonl: expected rows, found none"),
        ("", r"a\.jsonl: expected rows, found none"),
    ],
)
def test_a_bad_json_line_is_named(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(DataError, match=said):
        read(JsonLines(put(tmp_path / "a.jsonl", text)))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "txet,label\na,x\n",
            r"a\.csv:1: expected a column 'text', found txet, label, nearest 'txet'; set columns\.text",
        ),
        ("text,label\na,x\nb\n", r"a\.csv:3: expected 2 fields, found 1"),
        ("text,label\na,b,x\n", r"a\.csv:2: expected 2 fields, found 3; quote"),
        ('text,label\n"a"b,x\n', r"a\.csv:2: expected comma-separated values"),
        ('text,label\n"a,x\n', r"a\.csv:\d: expected comma-separated values"),
        ("text,label\na,\n", r"a\.csv:2: .*column 'label', found nothing"),
        ("text,label\n", r"a\.csv: expected rows, found none"),
        ("", r"a\.csv: expected rows, found none"),
    ],
)
def test_a_bad_csv_line_is_named(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(DataError, match=said):
        read(Csv(put(tmp_path / "a.csv", text)))


@pytest.mark.parametrize("kind", [JsonLines, Csv, Parquet])
@pytest.mark.parametrize("name", ["", "absent", "absent/*.x", "~nobody-of-this-name/x"])
def test_a_missing_file_is_one_sentence(kind: type, name: str) -> None:
    with pytest.raises(DataError, match=rf"data\.origin\.{kind.__name__.lower()[:3]}\w*\.path: expected a file"):
        read(kind(name))


def test_a_file_in_another_encoding_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes("text,label\ncafé,x\n".encode("latin-1"))
    with pytest.raises(DataError, match="UTF-8"):
        read(Csv(str(tmp_path / "a.csv")))


def test_a_file_that_is_not_parquet_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="expected a Parquet file"):
        read(Parquet(put(tmp_path / "a.parquet", "text,label")))


def test_a_missing_parquet_column_is_named(parquet: Path) -> None:
    with pytest.raises(DataError, match="expected a column 'text', found body, label"):
        read(Parquet(str(parquet)))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (Hub(), "expected a data set's name or folder"),
        (Hub("HERE", split="dev"), "Unknown split"),
        (Hub("HERE", config="other"), "'other' not found"),
        (Hub("HERE"), "expected a column 'text', found body, label"),
        (Hub("HERE/empty"), "doesn't contain any data files"),
    ],
)
def test_a_hub_source_that_cannot_be_used_is_one_sentence(parquet: Path, settings: Hub, said: str) -> None:
    (parquet / "empty").mkdir()
    with pytest.raises(DataError, match=said):
        read(Hub(settings.name.replace("HERE", str(parquet)), settings.config, settings.split))


def test_a_hub_folder_with_a_torn_file_says_what_is_wrong_in_it(tmp_path: Path) -> None:
    put(tmp_path / "train.jsonl", '{"text": "a", "label": "x"}\n{"text": "b"')
    with pytest.raises(DataError, match="JSON parse error"):
        read(Hub(str(tmp_path)))


def test_a_hub_name_offline_is_refused_without_waiting(tmp_path: Path) -> None:
    program = "from fedpeft.config.data import Hub; from fedpeft.data.sources import read; read(Hub('nobody/nothing'))"
    folders = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "PYTHONPATH": ":".join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-c", program], env=folders, capture_output=True, text=True, timeout=60, check=False
    )
    assert "DataError: data.origin.hub (nobody/nothing)" in done.stderr
    assert "OfflineModeIsEnabled" in done.stderr


def test_a_bundled_name_that_is_unknown_is_one_sentence() -> None:
    with pytest.raises(AssetError, match="the nearest is sentiment"):
        read(Bundled("sentiments"))


@pytest.mark.assets
def test_a_bundled_model_is_not_rows() -> None:
    with pytest.raises(AssetError, match="asset minilm: expected an asset that holds rows, found a model"):
        read(Bundled("minilm"))
