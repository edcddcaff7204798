"""Rows, and how a record of a source becomes one: by the roles of the columns that a task reads."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from fedpeft.config.data import Columns
from fedpeft.errors import DataError, sentence

Value = str | tuple[str, ...] | tuple[tuple[str, str], ...]
"""A field: a text, a sequence of texts, or the turns of a conversation as pairs of speaker and text."""

TEXT_AND_LABEL = ("text", "label")
"""The roles that a row has where no task says otherwise."""


@dataclass(frozen=True)
class Row:
    """One row of data.

    `text` tells rows apart: two rows of one text are repeats. `label` is what a split keeps in proportion and what
    partitions skew; it is empty where the task has no labels, and `group` where the data has no natural group.
    `fields` holds what else the task reads, by role.
    """

    text: str
    label: str = ""
    group: str = ""
    fields: Mapping[str, Value] = field(default_factory=dict, hash=False)


def column_names(columns: Columns, roles: Sequence[str]) -> dict[str, str]:
    """The column of each role that is read, `group` last where the rows have one."""
    names = {role: str(getattr(columns, role)) for role in roles}
    return {**names, "group": columns.group} if columns.group else names


def to_row(record: Mapping[str, Any], names: Mapping[str, str], place: str) -> Row:
    """The row that a record holds, under the columns `names` (role to column).

    The first role tells rows apart.

    Raises:
        DataError: a field is empty or not what its role asks for; the message names `place`.
    """
    values = {role: KINDS.get(role, _text)(record[column], column, place) for role, column in names.items()}
    rest = {role: value for role, value in values.items() if role not in ("text", "label", "group")}
    identity = next(iter(values.values()))
    return Row(_spoken(identity), str(values.get("label", "")), str(values.get("group", "")), rest)


def require_columns(place: str, names: Mapping[str, str], known: Sequence[str]) -> None:
    """Raises DataError, naming the nearest column, if one of `names` is not `known`."""
    for role, name in names.items():
        if name in known:
            continue
        near = get_close_matches(name, known, n=1, cutoff=0.0)
        hint = f", nearest {near[0]!r}" if near else ""
        raise unreadable(
            place,
            f"a column {name!r}",
            f"{', '.join(known) or 'no columns'}{hint}",
            f"set columns.{role} to one of them",
        )


def unreadable(place: str, expected: str, found: object, remedy: str) -> DataError:
    """The error that says what stands at `place` instead of what is expected."""
    first = (str(found).strip().splitlines() or [type(found).__name__])[0].rstrip(".")
    return DataError(sentence(place, expected=expected, found=first, remedy=remedy))


def _text(value: Any, column: str, place: str) -> str:
    plain = isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value))
    text = str(value).strip() if plain else ""
    if text and not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
        raise unreadable(place, f"Unicode text in column {column!r}", "half of a surrogate pair", "correct the row")
    if not text:
        found = "nothing" if value is None or plain else f"a {type(value).__name__}"
        raise unreadable(place, f"text in column {column!r}", found, "fill it in or remove the row")
    return text


def _texts(value: Any, column: str, place: str) -> tuple[str, ...]:
    """A list of texts; one text is taken apart at its white space."""
    items = value.split() if isinstance(value, str) else value
    if not isinstance(items, list | tuple) or not items:
        found = "nothing" if value is None or value in ("", [], ()) else f"a {type(value).__name__}"
        raise unreadable(place, f"a list of texts in column {column!r}", found, "fill it in or remove the row")
    return tuple(_text(item, column, place) for item in items)


def _turns(value: Any, column: str, place: str) -> tuple[tuple[str, str], ...]:
    """A conversation: a list of objects with the keys `role` and `content`."""
    turns = value if isinstance(value, list | tuple) else ()
    if not turns or not all(isinstance(turn, Mapping) and {"role", "content"} <= set(turn) for turn in turns):
        raise unreadable(
            place,
            f"a list of objects with role and content in column {column!r}",
            "nothing" if value is None else f"a {type(value).__name__} of another form",
            "correct the row or remove it",
        )
    return tuple((_text(turn["role"], column, place), _text(turn["content"], column, place)) for turn in turns)


KINDS: Mapping[str, Callable[[Any, str, str], Value]] = {"words": _texts, "tags": _texts, "messages": _turns}
"""What a role's value must be, where it is not one text: from value, column and place to the field."""


def _spoken(value: Value) -> str:
    """The text that a field comes to; of a conversation what comes before its last turn, which is the answer."""
    if isinstance(value, str):
        return value
    pairs = [part for part in value if not isinstance(part, str)]
    return " ".join(f"{speaker}: {text}" for speaker, text in pairs[:-1]) or " ".join(map(str, value))
