"""Rows as they stand at their source: one reader for each kind of source."""

from __future__ import annotations

import csv
import glob
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import singledispatch
from pathlib import Path
from typing import Any

from fedpeft import assets
from fedpeft.config.data import Bundled, Columns, Csv, FileSource, Hub, JsonLines, Parquet
from fedpeft.errors import DataError, sentence


@dataclass(frozen=True)
class Row:
    """One text with its label; `group` is empty where the data has no natural group."""

    text: str
    label: str
    group: str = ""


@singledispatch
def read(origin: object) -> list[Row]:
    """Every row of the source that `origin` describes, in its order, repeats and all.

    Texts, labels and groups come without surrounding white space; numbers as labels become text.

    Raises:
        DataError: the source is missing, empty or unreadable, lacks a column, or has a row without text,
            label or group; the message names the file and line.
        AssetError: a bundled data set is not in the cache.
    """
    raise TypeError(f"no reader for {type(origin).__name__}")


@read.register
def _bundled(origin: Bundled) -> list[Row]:
    path = assets.resolve(origin.name) / assets.ROWS_FILE
    if not path.is_file():
        raise DataError(
            sentence(
                "data.origin.bundled.name",
                expected="an asset that holds rows",
                found=repr(origin.name),
                remedy="name another, such as sentiment",
            )
        )
    return list(_json_rows(path, Columns(group="group")))


@read.register
def _jsonl(origin: JsonLines) -> list[Row]:
    return _each_file(origin, "data.origin.jsonl", (".jsonl",), lambda path: _json_rows(path, origin.columns))


@read.register
def _csv(origin: Csv) -> list[Row]:
    return _each_file(
        origin, "data.origin.csv", (".csv", ".tsv"), lambda path: _csv_rows(path, origin.columns, origin.delimiter)
    )


@read.register
def _parquet(origin: Parquet) -> list[Row]:
    return _each_file(origin, "data.origin.parquet", (".parquet",), lambda path: _parquet_rows(path, origin.columns))


@read.register
def _hub(origin: Hub) -> list[Row]:
    place = f"data.origin.hub ({origin.name})"
    if not origin.name:
        raise DataError(
            sentence("data.origin.hub.name", expected="a data set's name or folder", found="nothing", remedy="set it")
        )
    try:
        import datasets
    except ImportError as error:
        raise _no_extra(place, "datasets") from error
    try:
        table = datasets.load_dataset(origin.name, origin.config or None, split=origin.split)
    except datasets.exceptions.DatasetGenerationError as error:
        raise _unreadable(place, "files that can be read", error.__cause__ or error, "correct the file") from error
    except (datasets.exceptions.DatasetsError, OSError, ValueError, RuntimeError) as error:
        raise _unreadable(
            place,
            "a data set and split that can be loaded",
            error,
            "check name, config and split, or name a local folder",
        ) from error
    _require_columns(place, origin.columns, table.column_names)
    wanted = table.select_columns(_wanted(origin.columns))
    spelled = {name: kind.int2str for name, kind in wanted.features.items() if isinstance(kind, datasets.ClassLabel)}
    rows = [
        _row(_spell(record, spelled), origin.columns, f"{place} row {number}")
        for number, record in enumerate(wanted, start=1)
    ]
    return _not_empty(rows, place)


def _each_file(
    origin: FileSource, place: str, suffixes: Sequence[str], reader: Callable[[Path], Iterable[Row]]
) -> list[Row]:
    rows: list[Row] = []
    for path in _files(origin.path, place, suffixes):
        try:
            rows += _not_empty(list(reader(path)), str(path))
        except UnicodeDecodeError as error:
            raise _unreadable(str(path), "text in UTF-8", error, "save the file as UTF-8") from error
        except OSError as error:
            raise _unreadable(str(path), "a readable file", error, "check its permissions") from error
    return rows


def _files(name: str, place: str, suffixes: Sequence[str]) -> list[Path]:
    path = Path(os.path.expanduser(name))
    if name and path.is_file():
        return [path]
    if name and path.is_dir():
        found = sorted(entry for entry in path.iterdir() if entry.suffix in suffixes and entry.is_file())
    else:
        found = sorted(Path(match) for match in glob.glob(str(path), recursive=True) if Path(match).is_file())
    if not found:
        raise DataError(
            sentence(
                f"{place}.path",
                expected=f"a file, folder or glob of {' or '.join(suffixes)} files",
                found=f"no such file in {name!r}",
                remedy="correct the path",
            )
        )
    return found


def _json_rows(path: Path, columns: Columns) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            place = f"{path}:{number}"
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise _unreadable(place, "one JSON object", error, "correct the line") from error
            if not isinstance(record, dict):
                raise _unreadable(place, "one JSON object", type(record).__name__, "correct the line")
            _require_columns(place, columns, list(record))
            yield _row(record, columns, place)


def _csv_rows(path: Path, columns: Columns, delimiter: str) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        lines = csv.reader(file, delimiter=delimiter, strict=True)
        try:
            header = next(lines, [])
            if header:
                _require_columns(f"{path}:1", columns, header)
            for values in lines:
                place = f"{path}:{lines.line_num}"
                if not values:
                    continue
                if len(values) != len(header):
                    raise _unreadable(
                        place, f"{len(header)} fields", str(len(values)), "quote fields that hold the delimiter"
                    )
                yield _row(dict(zip(header, values, strict=True)), columns, place)
        except csv.Error as error:
            raise _unreadable(
                f"{path}:{lines.line_num}", "comma-separated values", error, "correct the line"
            ) from error


def _parquet_rows(path: Path, columns: Columns) -> Iterator[Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise _no_extra(str(path), "pyarrow") from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            _require_columns(str(path), columns, file.schema_arrow.names)
            records = file.read(columns=_wanted(columns)).to_pylist()
    except pyarrow.ArrowException as error:
        raise _unreadable(str(path), "a Parquet file", error, "write it again") from error
    for number, record in enumerate(records, start=1):
        yield _row(record, columns, f"{path} row {number}")


def _wanted(columns: Columns) -> list[str]:
    return list(dict.fromkeys(name for name in (columns.text, columns.label, columns.group) if name))


def _spell(record: Mapping[str, Any], spelled: Mapping[str, Callable[[int], str]]) -> dict[str, Any]:
    """Class numbers replaced by the names that the data set gives them; -1 stands for no label."""
    return {
        key: value if key not in spelled or value is None else spelled[key](value) if value >= 0 else None
        for key, value in record.items()
    }


def _row(record: Mapping[str, Any], columns: Columns, place: str) -> Row:
    return Row(
        text=_field(record, columns.text, place),
        label=_field(record, columns.label, place),
        group=_field(record, columns.group, place) if columns.group else "",
    )


def _field(record: Mapping[str, Any], column: str, place: str) -> str:
    value = record[column]
    plain = isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value))
    text = str(value).strip() if plain else ""
    if text and not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
        raise _unreadable(place, f"Unicode text in column {column!r}", "half of a surrogate pair", "correct the row")
    if not text:
        found = "nothing" if value is None or plain else f"a {type(value).__name__}"
        raise _unreadable(place, f"text in column {column!r}", found, "fill it in or remove the row")
    return text


def _require_columns(place: str, columns: Columns, known: Sequence[str]) -> None:
    for key, name in (("text", columns.text), ("label", columns.label), ("group", columns.group)):
        if name in known or (key == "group" and not name):
            continue
        near = get_close_matches(name, known, n=1, cutoff=0.0)
        hint = f", nearest {near[0]!r}" if near else ""
        raise _unreadable(
            place,
            f"a column {name!r}",
            f"{', '.join(known) or 'no columns'}{hint}",
            f"set columns.{key} to one of them",
        )


def _not_empty(rows: list[Row], place: str) -> list[Row]:
    if not rows:
        raise _unreadable(place, "rows", "none", "name a source that holds some")
    return rows


def _unreadable(place: str, expected: str, found: object, remedy: str) -> DataError:
    first = (str(found).strip().splitlines() or [type(found).__name__])[0].rstrip(".")
    return DataError(sentence(place, expected=expected, found=first, remedy=remedy))


def _no_extra(place: str, library: str) -> DataError:
    return _unreadable(place, f"the library {library}", "it is not installed", "install fedpeft[data]")
