"""The ledger of a private run: what each released value cost, on disk before the value exists.

One JSON line an expense, appended and never cut back. A run that dies between paying and releasing has paid; when it
goes on, the round is paid for again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from fedpeft.errors import CheckpointError, sentence
from fedpeft.updates import Spent

_MODE = 0o600


def pay(path: Path, spent: Spent) -> None:
    """`spent` stands in the ledger, on disk.

    Raises:
        OSError: the disk is full or not writable.
    """
    line = json.dumps(asdict(spent), sort_keys=True, separators=(",", ":")).encode() + b"\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_RDWR | os.O_CREAT, _MODE)
    with os.fdopen(handle, "r+b") as file:
        content = file.read()
        file.seek(
            content.rfind(b"\n") + 1
        )  # a line that was torn by a kill was not paid: nothing was released after it
        file.truncate()
        file.write(line)
        file.flush()
        os.fsync(file.fileno())


def paid(path: Path, history: tuple[Spent, ...]) -> tuple[Spent, ...]:
    """All that stands in the ledger, of which `history` must be the beginning or part.

    Raises:
        CheckpointError: the ledger lacks something of `history`, or is corrupt.
    """
    found = tuple(_expense(line, path) for line in path.read_bytes().split(b"\n")[:-1]) if path.exists() else ()
    missing = [spent for spent in history if history.count(spent) > found.count(spent)]
    if missing:
        raise CheckpointError(
            sentence(
                str(path),
                expected=f"the expense of round {missing[0].round}, which the checkpoint has",
                found=f"{len(found)} expenses without it",
                remedy="restore the file from a copy, or start a new run",
            )
        )
    return found


def expense_from_fields(values: Mapping[str, Any]) -> Spent:
    """The expense of these fields.

    Raises:
        TypeError: they are not those of an expense.
    """
    return Spent(**{field.name: values[field.name] for field in fields(Spent) if field.name in values})


def _expense(line: bytes, path: Path) -> Spent:
    try:
        return expense_from_fields(json.loads(line))
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(
            sentence(
                str(path),
                expected="one expense in each line",
                found=repr(line[:60].decode(errors="replace")),
                remedy="restore the file from a copy, or start a new run",
            )
        ) from error
