"""How a settings dataclass declares, checks and chooses.

A settings class is a frozen dataclass of scalars, tuples of scalars, other settings classes, and
`Choice`s. A `Choice` is a name that picks one settings class out of a table, beside the settings of
every member, so that a file can switch by one key and still hold what each member needs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from fedpeft.errors import ConfigError, sentence


@dataclass(frozen=True)
class Table:
    """The one place where the names of a family of settings become dataclasses.

    Where members can be in force together, `together(members)` makes one settings object of several. `refused`
    are names that stand for nothing here, and why.
    """

    key: str
    members: Mapping[str, type]
    together: Callable[[tuple[Any, ...]], Any] | None = None
    refused: Mapping[str, str] = field(default_factory=dict)

    def names(self, name: object) -> tuple[str, ...]:
        """The members that `name` stands for: one, or several with + between; none where it stands for nothing."""
        parts = tuple(part.strip() for part in name.split("+")) if isinstance(name, str) else ()
        several = len(parts) > 1
        known = all(part in self.members for part in parts) and len(set(parts)) == len(parts)
        return parts if known and (self.together or not several) else ()


@dataclass(frozen=True)
class Choice:
    """The member of a table that is in force, and the settings of all its members."""

    table: Table = field(repr=False)
    name: str
    members: Mapping[str, Any] = field(repr=False)

    @property
    def chosen(self) -> Any:
        """The settings object of the member in force, or of those that are in force together."""
        members = tuple(self.members[name] for name in self.names)
        return self.table.together(members) if len(members) > 1 and self.table.together else members[0]

    @property
    def names(self) -> tuple[str, ...]:
        """The members in force."""
        return self.table.names(self.name)

    def __hash__(self) -> int:
        return hash((self.name, tuple(sorted(self.members.items(), key=lambda item: item[0]))))


def choose(table: Table, name: str, **members: Any) -> Choice:
    """A choice of `name` in `table`; members not given have their default settings.

    Raises:
        ConfigError: the table has no such name, or no such member.
    """
    for asked in (name, *members):
        known = ", ".join(table.members)
        remedy = table.refused.get(asked, "choose one of them")
        require(bool(table.names(asked)), table.key, expected=f"one of {known}", found=asked, remedy=remedy)
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
                if name in value.names or member != value.table.members[name]():
                    yield from walk(member, f"{key}.{name}.")
        elif dataclasses.is_dataclass(value):
            yield from walk(value, f"{key}.")
        else:
            yield key, value
