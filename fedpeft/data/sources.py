"""Rows as they stand at their source: one reader for each kind of source."""

from __future__ import annotations

import csv
import glob
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import singledispatch
from pathlib import Path
from typing import Any

from fedpeft import assets
from fedpeft.config.data import Bundled, Columns, Csv, FileSource, Hub, Images, JsonLines, Parquet
from fedpeft.data import images
from fedpeft.data.fields import TEXT_AND_LABEL, Row, column_names, require_columns, to_row, unreadable
from fedpeft.errors import DataError, sentence

__all__ = ["Row", "read"]


@singledispatch
def read(origin: object, roles: Sequence[str] = TEXT_AND_LABEL) -> list[Row]:  # noqa: ARG001
    """Every row of the source that `origin` describes, in its order, repeats and all.

    `roles` are those of the columns that are read beside the group; the first tells rows apart. Texts come without
    surrounding white space; numbers become text.

    Raises:
        DataError: the source is missing, empty or unreadable, lacks a column, or has a row with a field that is
            empty; the message names the file and line.
        AssetError: a bundled data set is not in the cache, or is a model.
    """
    raise TypeError(f"no reader for {type(origin).__name__}")


@read.register
def _bundled(origin: Bundled, roles: Sequence[str] = TEXT_AND_LABEL) -> list[Row]:
    path = assets.rows_path(origin.name)
    return list(images.located(_json_rows(path, column_names(Columns(group="group"), roles)), path.parent))


@read.register
def _images(origin: Images, roles: Sequence[str] = TEXT_AND_LABEL) -> list[Row]:
    return images.read_folders(origin, roles)


@read.register
def _jsonl(origin: JsonLines, roles: Sequence[str] = TEXT_AND_LABEL) -> list[Row]:
    names = column_names(origin.columns, roles)
    return _each_file(origin, "data.origin.jsonl", (".jsonl",), lambda path: _json_rows(path, names))


@read.register
def _csv(origin: Csv, roles: Sequence[str] = TEXT_AND_LABEL) -> list[Row]:
    names = column_names(origin.columns, roles)
    return _each_file(
        origin, "data.origin.csv", (".csv", ".tsv"), lambda path: _csv_rows(path, names, origin.delimiter)
    )


@read.register
def _parquet(origin: Parquet, roles: Sequence[str] = TEXT_AND_LABEL) -> list[Row]:
    names = column_names(origin.columns, roles)
    return _each_file(origin, "data.origin.parquet", (".parquet",), lambda path: _parquet_rows(path, names))


@read.register
def _hub(origin: Hub, roles: Sequence[str] = TEXT_AND_LABEL) -> list[Row]:
    names = column_names(origin.columns, roles)
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
        raise unreadable(place, "files that can be read", error.__cause__ or error, "correct the file") from error
    except (datasets.exceptions.DatasetsError, OSError, ValueError, RuntimeError) as error:
        raise unreadable(
            place,
            "a data set and split that can be loaded",
            error,
            "check name, config and split, or name a local folder",
        ) from error
    require_columns(place, names, table.column_names)
    wanted = table.select_columns(_distinct(names))
    of_one = {name: getattr(kind, "feature", kind) for name, kind in wanted.features.items()}
    spelled = {name: kind.int2str for name, kind in of_one.items() if isinstance(kind, datasets.ClassLabel)}
    rows = [
        to_row(_spell(record, spelled), names, f"{place} row {number}") for number, record in enumerate(wanted, start=1)
    ]
    return _not_empty(rows, place)


def _each_file(
    origin: FileSource, place: str, suffixes: Sequence[str], reader: Callable[[Path], Iterable[Row]]
) -> list[Row]:
    rows: list[Row] = []
    for path in _files(origin.path, place, suffixes):
        try:
            rows += _not_empty(list(images.located(reader(path), path.parent)), str(path))
        except UnicodeDecodeError as error:
            raise unreadable(str(path), "text in UTF-8", error, "save the file as UTF-8") from error
        except OSError as error:
            raise unreadable(str(path), "a readable file", error, "check its permissions") from error
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


def _json_rows(path: Path, names: Mapping[str, str]) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            place = f"{path}:{number}"
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise unreadable(place, "one JSON object", error, "correct the line") from error
            if not isinstance(record, dict):
                raise unreadable(place, "one JSON object", type(record).__name__, "correct the line")
            require_columns(place, names, list(record))
            yield to_row(record, names, place)


def _csv_rows(path: Path, names: Mapping[str, str], delimiter: str) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        lines = csv.reader(file, delimiter=delimiter, strict=True)
        try:
            header = next(lines, [])
            if header:
                require_columns(f"{path}:1", names, header)
            for values in lines:
                place = f"{path}:{lines.line_num}"
                if not values:
                    continue
                if len(values) != len(header):
                    raise unreadable(
                        place, f"{len(header)} fields", str(len(values)), "quote fields that hold the delimiter"
                    )
                yield to_row(dict(zip(header, values, strict=True)), names, place)
        except csv.Error as error:
            raise unreadable(f"{path}:{lines.line_num}", "comma-separated values", error, "correct the line") from error


def _parquet_rows(path: Path, names: Mapping[str, str]) -> Iterator[Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise _no_extra(str(path), "pyarrow") from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            require_columns(str(path), names, file.schema_arrow.names)
            records = file.read(columns=_distinct(names)).to_pylist()
    except pyarrow.ArrowException as error:
        raise unreadable(str(path), "a Parquet file", error, "write it again") from error
    for number, record in enumerate(records, start=1):
        yield to_row(record, names, f"{path} row {number}")


def _distinct(names: Mapping[str, str]) -> list[str]:
    return list(dict.fromkeys(names.values()))


def _spell(record: Mapping[str, Any], spelled: Mapping[str, Callable[[int], str]]) -> dict[str, Any]:
    """Class numbers, alone or in lists, replaced by the names that the data set gives them; -1 stands for none."""
    return {key: _named(value, spelled[key]) if key in spelled else value for key, value in record.items()}


def _named(value: Any, name: Callable[[int], str]) -> Any:
    if isinstance(value, list):
        return [_named(item, name) for item in value]
    return name(value) if value is not None and value >= 0 else None


def _not_empty(rows: list[Row], place: str) -> list[Row]:
    if not rows:
        raise unreadable(place, "rows", "none", "name a source that holds some")
    return rows


def _no_extra(place: str, library: str) -> DataError:
    return unreadable(place, f"the library {library}", "it is not installed", "install fedpeft[data]")
