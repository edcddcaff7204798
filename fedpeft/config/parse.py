"""Settings to and from TOML text, nested tables, and flat scalars.

Flower's run-config takes scalars only, so a flat value that is a list is carried as its JSON text.
All four forms hold the same thing: going to any of them and back gives an equal RunConfig.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import hashlib
import json
import math
import tomllib
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import tomli_w

from fedpeft.config.fields import Choice, Table, walk
from fedpeft.config.run import RunConfig
from fedpeft.errors import ConfigError, sentence

Scalar = bool | int | float | str
Settings = typing.TypeVar("Settings")


def load(path: Path, overrides: Iterable[str] = ()) -> RunConfig:
    """The settings in a TOML file, with `key=value` overrides applied on top.

    Raises:
        ConfigError: no such file, not TOML, or a key or value that is not valid.
    """
    return from_tree(overlay(RunConfig, read_tree(path), overrides))


def read_tree(path: Path) -> dict[str, Any]:
    """The nested tables of a TOML file.

    Raises:
        ConfigError: no such file, or not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            sentence(str(path), expected="a TOML file", found="no such file", remedy="check the path")
        ) from None
    except OSError as error:
        found = (error.strerror or str(error)).lower()
        raise ConfigError(sentence(str(path), expected="a TOML file", found=found, remedy="check the path")) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(
            sentence(str(path), expected="a TOML file", found=str(error), remedy="correct the file")
        ) from error


def override(config: RunConfig, overrides: Iterable[str]) -> RunConfig:
    """`config` with `key=value` texts applied on top.

    Raises:
        ConfigError: a key or value that is not valid.
    """
    return from_tree(overlay(RunConfig, to_tree(config), overrides))


def from_tree(tree: Mapping[str, Any]) -> RunConfig:
    """Settings from nested tables, as `tomllib` gives them.

    Raises:
        ConfigError: a key or value that is not valid.
    """
    return build(RunConfig, tree)


def build(kind: type[Settings], tree: Mapping[str, Any]) -> Settings:
    """Settings of the class `kind` from nested tables.

    Raises:
        ConfigError: a key or value that is not valid.
    """
    found: Settings = _build(kind, tree, "", kind)
    return found


def to_tree(config: object) -> dict[str, Any]:
    """Nested tables of plain values, fit for TOML; of the settings of a run, or of any other settings."""
    return nest({key: list(value) if isinstance(value, tuple) else value for key, value in walk(config)})


def to_toml(config: RunConfig) -> str:
    """The settings as TOML text, every value in force spelled out."""
    return tomli_w.dumps(to_tree(config))


def to_flat(config: RunConfig) -> dict[str, Scalar]:
    """Dotted keys to scalars; lists as JSON text."""
    return {key: json.dumps(list(value)) if isinstance(value, tuple) else value for key, value in walk(config)}


def from_flat(flat: Mapping[str, Scalar]) -> RunConfig:
    """The inverse of `to_flat`; texts are read as the type that their key has."""
    return from_tree(nest(flat))


def digest(config: RunConfig) -> str:
    """SHA-256 of what server and nodes must agree on.

    That is every setting but the run's name and place, the machine's share in it, when it is scored, and what it tells.
    """
    local = ("name", "out", "compute.", "evaluation.", "observation.", "model.device")
    flat = {key: value for key, value in to_flat(config).items() if not key.startswith(local)}
    return hashlib.sha256(json.dumps(flat, sort_keys=True).encode()).hexdigest()


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted keys unfolded into nested dictionaries.

    Raises:
        ConfigError: a key names both a value and a table.
    """
    tree: dict[str, Any] = {}
    for key, value in flat.items():
        *parents, last = key.split(".")
        table = tree
        for parent in parents:
            table = table.setdefault(parent, {})
            if not isinstance(table, dict):
                raise ConfigError(
                    sentence(key, expected="a table", found=f"a value at {parent}", remedy="remove one of the two keys")
                )
        if isinstance(table.get(last), dict):
            raise ConfigError(
                sentence(key, expected="a table", found=f"a value at {key}", remedy="remove one of the two keys")
            )
        table[last] = value
    return tree


def _split(item: str) -> tuple[str, str]:
    key, equals, value = item.partition("=")
    if not equals or not key.strip():
        raise ConfigError(
            sentence("--set", expected="key=value", found=repr(item), remedy="write for example rounds=3")
        )
    return key.strip(), value.strip()


def overlay(
    kind: type, tree: Mapping[str, Any], overrides: Iterable[str], below: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """`tree` over `below`, with each of the overrides on top, the last one highest; tables of settings `kind`."""
    result = _merge(_spell_out(kind, below or {}), _spell_out(kind, tree))
    for item in overrides:
        result = _merge(result, _spell_out(kind, nest(dict([_split(item)]))))
    return result


def _spell_out(kind: type, tree: Mapping[str, Any]) -> dict[str, Any]:
    """`tree` with each choice that is given as a bare name turned into a table, so that tables can be merged."""
    fields = {item.name: item for item in dataclasses.fields(kind)}
    hints = typing.get_type_hints(kind)
    result = dict(tree)
    for name, value in tree.items():
        table = fields[name].metadata.get("table") if name in fields else None
        if table is not None and isinstance(value, str):
            result[name] = {table.key: value}
        elif name in fields and dataclasses.is_dataclass(hints[name]) and isinstance(value, Mapping) and table is None:
            result[name] = _spell_out(typing.cast(type, hints[name]), value)
    return result


def _merge(tree: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(tree)
    for key, value in top.items():
        below = merged.get(key)
        merged[key] = _merge(below, value) if isinstance(value, Mapping) and isinstance(below, Mapping) else value
    return merged


def _build(kind: type, tree: Mapping[str, Any], prefix: str, whole: type) -> Any:
    """Settings of the class `kind`, which stand at `prefix` in those of the class `whole`."""
    fields = {item.name: item for item in dataclasses.fields(kind)}
    hints = typing.get_type_hints(kind)
    _refuse_unknown(tree, fields, prefix, whole)
    values = {}
    for name, value in tree.items():
        table = fields[name].metadata.get("table")
        key = f"{prefix}{name}"
        if table is not None:
            values[name] = _build_choice(table, value, fields[name].metadata["default"], key, whole)
        elif dataclasses.is_dataclass(hints[name]):
            values[name] = _build(typing.cast(type, hints[name]), _as_table(value, key), f"{key}.", whole)
        else:
            values[name] = _convert(value, hints[name], key)
    try:
        return kind(**values)
    except ConfigError as error:
        raise type(error)(f"{prefix}{error}") from None


def _build_choice(table: Table, value: Any, default: str, key: str, whole: type) -> Choice:
    tree = _as_table({table.key: value} if isinstance(value, str) else value, key)
    _refuse_unknown(tree, {table.key: None, **table.members}, f"{key}.", whole)
    name = tree.get(table.key, default)
    if table.together and isinstance(name, list):
        name = "+".join(str(part) for part in name)
    if not table.names(name):
        expected = f"one of {', '.join(table.members)}"
        remedy = table.refused.get(str(name), f"did you mean {_nearest(str(name), table.members)!r}")
        raise ConfigError(sentence(f"{key}.{table.key}", expected=expected, found=repr(name), remedy=remedy))
    members = {
        member: _build(kind, _as_table(tree.get(member, {}), f"{key}.{member}"), f"{key}.{member}.", whole)
        for member, kind in table.members.items()
    }
    return Choice(table, name, members)


def _refuse_unknown(tree: Mapping[str, Any], known: Mapping[str, Any], prefix: str, whole: type) -> None:
    for name in tree:
        if name not in known:
            elsewhere = [key for key in _every_key(whole, "") if key.endswith(f".{name}")]
            near = elsewhere[0] if elsewhere else f"{prefix}{_nearest(name, known)}" if known else ""
            raise ConfigError(
                sentence(
                    f"{prefix}{name}",
                    expected=f"one of the keys {', '.join(known)}" if known else "no settings",
                    found=f"the unknown key {name!r}",
                    remedy=f"did you mean {near}" if near else "remove it",
                )
            )


def _every_key(kind: type, prefix: str) -> Iterator[str]:
    """The dotted key of every setting, those of all members of a choice among them."""
    hints = typing.get_type_hints(kind)
    for item in dataclasses.fields(kind):
        key = f"{prefix}{item.name}"
        yield key
        if "table" in item.metadata:
            for name, member in item.metadata["table"].members.items():
                yield from _every_key(member, f"{key}.{name}.")
        elif dataclasses.is_dataclass(hints[item.name]):
            yield from _every_key(typing.cast(type, hints[item.name]), f"{key}.")


def _nearest(name: str, known: Iterable[str]) -> str:
    candidates = list(known)
    return difflib.get_close_matches(name, candidates, n=1, cutoff=0.0)[0]


def _as_table(value: Any, key: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(
            sentence(key, expected="a table of settings", found=repr(value), remedy=f"write [{key}] or {key}.something")
        )
    return value


def _convert(value: Any, hint: Any, key: str) -> Any:
    """`value` as the type `hint`: a text as that type, a whole number as a float, a number as a text."""
    if typing.get_origin(hint) is tuple:
        return tuple(_convert(item, typing.get_args(hint)[0], key) for item in _as_list(value, key))
    if isinstance(hint, types.UnionType):
        raise TypeError(f"{key}: settings have one type each")
    converted = _converted(value, hint)
    if type(converted) is not hint or (hint is float and not math.isfinite(converted)):
        expected = f"a value of type {hint.__name__}" if hint is not float else "a finite number"
        raise ConfigError(sentence(key, expected=expected, found=repr(value), remedy="correct the value"))
    return converted


def _converted(value: Any, hint: type) -> Any:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if isinstance(value, str) and hint is bool:
        return {"true": True, "false": False}.get(value.lower(), value)
    if (
        (isinstance(value, str) and hint in {int, float})
        or (number and hint is str)
        or (type(value), hint) == (int, float)
    ):
        with contextlib.suppress(ValueError, OverflowError):
            return hint(value)
    return value


def _as_list(value: Any, key: str) -> list[Any]:
    if isinstance(value, str):
        if not value.startswith("["):
            return [item.strip() for item in value.split(",") if item.strip()]
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise ConfigError(
                sentence(key, expected="a list", found=repr(value), remedy="write [a, b] as JSON or a,b")
            ) from error
    if not isinstance(value, list):
        raise ConfigError(sentence(key, expected="a list", found=repr(value), remedy="write a list"))
    return value
