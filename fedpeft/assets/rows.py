"""Rows as the cache holds them: JSON Lines in UTF-8, the fields named."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path


def write_rows(path: Path, rows: Iterable[Mapping[str, str | int]]) -> None:
    """Each row becomes one more line of the file at `path`."""
    with path.open("a", encoding="utf-8", newline="\n") as target:
        for row in rows:
            target.write(json.dumps(row, ensure_ascii=False) + "\n")
