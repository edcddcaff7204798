"""A journal that somebody else is writing, read as it grows."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from fedpeft import journal

_GUARD_BYTES = 4096


class Follower:
    """The records of the journal at `path`, each kept as `keep(record)`; `poll` reads only what is new.

    A torn last line has not happened yet. Where the journal was cut, replaced or begun anew, as a resumed run does,
    it is read from its beginning.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._forget()

    @property
    def records(self) -> list[dict[str, Any]]:
        """What the journal held when it was last polled, in order."""
        return list(self._records)

    def poll(self) -> bool:
        """Whether the journal holds something else than before; where there is none, it holds nothing.

        Raises:
            RunFolderError: a whole line of it is not a record of a journal.
        """
        try:
            with self._path.open("rb") as file:
                return self._read(file.fileno())
        except OSError:
            had = bool(self._records)
            self._forget()
            return had

    def _forget(self) -> None:
        self._records: list[dict[str, Any]] = []
        self._offset, self._inode, self._guard = 0, -1, b""

    def _read(self, handle: int) -> bool:
        found, changed = os.fstat(handle), False
        known = os.pread(handle, len(self._guard), self._offset - len(self._guard)) if self._guard else b""
        if found.st_ino != self._inode or found.st_size < self._offset or known != self._guard:
            changed = bool(self._records)
            self._forget()
            self._inode = found.st_ino
        fresh = os.pread(handle, max(0, found.st_size - self._offset), self._offset)
        whole = fresh[: fresh.rfind(b"\n") + 1]
        if not whole:
            return changed
        self._records += [self._record(line) for line in whole.splitlines()]
        self._offset += len(whole)
        self._guard = (self._guard + whole)[-_GUARD_BYTES:]
        return True

    def _record(self, line: bytes) -> dict[str, Any]:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if _is_whole(record):
            return _slim(record)
        journal.read(self._path)
        return {"event": "unread"}


def _is_whole(record: Any) -> bool:
    """Whether it is a record; one of a round must hold its clients, its failures and its seconds."""
    if not isinstance(record, dict) or not isinstance(record.get("event"), str):
        return False
    parts = {"round": int, "clients": list, "failures": list, "seconds": dict} if record["event"] == "round" else {}
    return all(isinstance(record.get(key), kind) for key, kind in parts.items())


def _slim(record: dict[str, Any]) -> dict[str, Any]:
    """`record` less what nobody watches and a long run has much of."""
    return {key: value for key, value in record.items() if key not in {"samples", "partitions", "cohort"}}
