"""The figures that a round's record holds, each under one name, as every sink gets them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

Record = Mapping[str, Any]

_NOT_IN_A_NAME = re.compile(r"[^\w.-]+")
_ADDRESSED = frozenset({"round", "event"})
_MOST_CHARACTERS = 80


def figures_of(record: Record) -> dict[str, float]:
    """Names such as `loss`, `seconds/exchange`, `held_out/accuracy`, `held_out/groups/films/accuracy`; finite values.

    The counts `updates` and `failures`, and `failures_of/partition_3` where that one failed, are among them; so is any
    other number that the round's merge measured, such as `merge_error`, `drift` and `residual_rank`.
    """
    found = {key: value for key, value in record.items() if key not in _ADDRESSED and _is_number(value)}
    found |= {"updates": len(record["clients"]), "failures": len(record["failures"])}
    found |= {f"seconds/{name}": value for name, value in record["seconds"].items()}
    for failure in record["failures"]:
        name = f"failures_of/partition_{failure['partition']}"
        found[name] = found.get(name, 0) + 1
    for title, key in (("held_out", "evaluation"), ("on_clients", "client_evaluation")):
        found |= {f"{title}/{name}": value for name, value in _scores(record.get(key) or {})}
    return {name: float(value) for name, value in found.items() if _is_number(value)}


def safe_name(text: str) -> str:
    """`text`, such as a group's name out of the data, as it may stand in the name of a figure."""
    return _NOT_IN_A_NAME.sub("_", text)[:_MOST_CHARACTERS] or "_"


def _scores(evaluation: Record) -> Iterator[tuple[str, Any]]:
    yield from ((name, value) for name, value in evaluation.items() if _is_number(value))
    for group, scores in (evaluation.get("groups") or {}).items():
        yield from ((f"groups/{safe_name(group)}/{name}", scores[name]) for name in scores if _is_number(scores[name]))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
