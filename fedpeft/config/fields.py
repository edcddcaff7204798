"""How a settings dataclass declares, checks and chooses.

A settings class is a frozen dataclass of scalars, tuples of scalars, other settings classes, and
`Choice`s. A `Choice` is a name that picks one settings class out of a table, beside the settings of
every member, so that a file can switch by one key and still hold what each member needs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from fedpeft.errors import ConfigError, sentence


@dataclass(frozen=True)
class Table:
    """The one place where the names of a family of settings become dataclasses."""

    key: str
    members: Mapping[str, type]


@dataclass(frozen=True)
class Choice:
    """The member of a table that is in force, and the settings of all its members."""

    table: Table = field(repr=False)
    name: str
    members: Mapping[str, Any] = field(repr=False)

    @property
    def chosen(self) -> Any:
        """The settings object of the member in force."""
        return self.members[self.name]

    def __hash__(self) -> int:
        return hash((self.name, tuple(sorted(self.members.items(), key=lambda item: item[0]))))


def choose(table: Table, name: str, **members: Any) -> Choice:
    """A choice of `name` in `table`; members not given have their default settings.

    Raises:
        ConfigError: the table has no such name, or no such member.
    """
    for asked in (name, *members):
        known = ", ".join(table.members)
        require(asked in table.members, table.key, expected=f"one of {known}", found=asked, remedy="choose one of them")
    return Choice(table, name, {key: members.get(key, kind()) for key, kind in table.members.items()})


def choice(table: Table, default: str) -> Any:
    """A dataclass field that holds a `Choice` from `table`, `default` unless said otherwise."""
    return field(default_factory=lambda: choose(table, default), metadata={"table": table, "default": default})


def require(holds: bool, key: str, *, expected: str, found: object, remedy: str = "correct the value") -> None:
    """Raises ConfigError naming `key` unless `holds`."""
    if not holds:
        raise ConfigError(sentence(key, expected=expected, found=repr(found), remedy=remedy))


def require_range(settings: object, key: str, low: float, high: float = float("inf")) -> None:
    """Raises ConfigError unless `low <= settings.key <= high`."""
    value = getattr(settings, key)
    bound = f"at least {low}" if high == float("inf") else f"between {low} and {high}"
    require(low <= value <= high, key, expected=f"a number {bound}", found=value)


def walk(settings: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every scalar of `settings` under its dotted key, in order of declaration.

    Members of a choice that are not in force appear only where they differ from their defaults.
    """
    for item in dataclasses.fields(settings):
        value = getattr(settings, item.name)
        key = f"{prefix}{item.name}"
        if isinstance(value, Choice):
            yield f"{key}.{value.table.key}", value.name
            for name, member in value.members.items():
                if name == value.name or member != value.table.members[name]():
                    yield from walk(member, f"{key}.{name}.")
        elif dataclasses.is_dataclass(value):
            yield from walk(value, f"{key}.")
        else:
            yield key, value
