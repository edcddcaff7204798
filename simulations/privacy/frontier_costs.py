"""What secure sums cost a round, out of a run's journal."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedpeft import journal


def costs(folder: Path) -> Mapping[str, Any]:
    """Bytes that a client sends a round, and the median of a round's seconds, all clients' work in one process.

    The first round, which loads what the others have, is left out of the seconds.
    """
    records = journal.read(folder / "journal.jsonl")
    rounds = [record for record in records if record["event"] == "round"]
    end = next(record for record in records if record["event"] == "end")
    asked = sum(len(record["cohort"]) for record in rounds)
    seconds = statistics.median(record["seconds"]["exchange"] for record in rounds[1:] or rounds)
    return {"bytes_up_of_a_client": end["bytes_up"] / asked, "round_seconds": seconds}
