"""The journal of a run: one JSON object a line, each on disk before the run goes on.

A line is written in one piece and ends with a newline, so a kill can tear the last line only.
A line without its newline never happened: `read` ignores it and `append` cuts it off.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fedpeft.errors import RunFolderError, sentence
from fedpeft.files import write_atomically

_BLOCK_BYTES = 65536
_LASTING_EVENTS = frozenset({"start", "resume", "missed", "finding"})


def append(path: Path, record: Mapping[str, Any]) -> None:
    """`record` is the last line of the journal, on disk; the file is made if there is none.

    NumPy scalars and arrays are written as numbers and lists; NaN and infinity as null.

    Raises:
        OSError: the disk is full or not writable; what was written of the line is cut off by the next append.
    """
    line = _encode(record)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    with os.fdopen(handle, "r+b") as file:
        file.truncate(_whole_bytes(file.fileno()))
        file.seek(0, os.SEEK_END)
        file.write(line)
        file.flush()
        os.fsync(file.fileno())


def read(path: Path) -> list[dict[str, Any]]:
    """The records of a journal in order, without a torn last line.

    Raises:
        RunFolderError: there is no journal, or a whole line of it is not a JSON object with an "event".
    """
    try:
        *lines, _torn = path.read_bytes().split(b"\n")
    except OSError as error:
        raise RunFolderError(
            sentence(
                str(path),
                expected="the journal of a run",
                found=f"no readable file ({error.strerror})",
                remedy="name the folder of a run that has started",
            )
        ) from error
    return [_decode(line, f"{path}:{number}") for number, line in enumerate(lines, start=1)]


def ended(path: Path) -> bool:
    """Whether the run has come to its end; one that has no journal yet has not.

    Raises:
        RunFolderError: see `read`.
    """
    return path.exists() and any(record["event"] == "end" for record in read(path))


def truncate(path: Path, rounds: int) -> None:
    """The journal holds its start, resume and missed lines and its rounds up to `rounds`, in order, and nothing else.

    The file is replaced at once: a kill leaves the old journal or the new one.

    Raises:
        RunFolderError: there is no journal, or it is corrupt.
        OSError: the disk is full or not writable; the journal is as it was.
    """
    kept = [record for record in read(path) if _happened_by(record, rounds)]
    write_atomically(path, b"".join(map(_encode, kept)))


def _happened_by(record: Mapping[str, Any], rounds: int) -> bool:
    if record["event"] == "round":
        return int(record["round"]) <= rounds
    return record["event"] in _LASTING_EVENTS


def _encode(record: Mapping[str, Any]) -> bytes:
    return json.dumps(_plain(record), allow_nan=False, separators=(",", ":")).encode() + b"\n"


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, np.generic | np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _decode(line: bytes, place: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        record = None
    if not _is_record(record):
        raise RunFolderError(
            sentence(
                place,
                expected='a JSON object with an "event"',
                found=repr(line[:60].decode(errors="replace")),
                remedy="delete that line or restore the file from a copy",
            )
        )
    return dict(record)


def _is_record(value: Any) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("event"), str):
        return False
    return value["event"] != "round" or (type(value.get("round")) is int and value["round"] >= 1)


def _whole_bytes(handle: int) -> int:
    """How many bytes of an open file stand before its torn last line."""
    end = os.fstat(handle).st_size
    while end > 0:
        start = max(0, end - _BLOCK_BYTES)
        newline = os.pread(handle, end - start, start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        end = start
    return 0
