from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.config import Choice, RunConfig, choose
from fedpeft.config.fields import Table, choice, require, require_range, walk
from fedpeft.errors import ConfigError
from tests.config.strategies import tables


@dataclass(frozen=True)
class Red:
    depth: int = 1


@dataclass(frozen=True)
class Blue:
    """Has no settings."""


COLOURS = Table("kind", {"red": Red, "blue": Blue})


@dataclass(frozen=True)
class Inner:
    names: tuple[str, ...] = ("a",)


@dataclass(frozen=True)
class Outer:
    size: int = 2
    colour: Choice = choice(COLOURS, "red")
    inner: Inner = field(default_factory=Inner)


def test_choose_gives_every_member_its_defaults() -> None:
    chosen = choose(COLOURS, "blue")
    assert chosen.chosen == Blue()
    assert chosen.members == {"red": Red(), "blue": Blue()}
    assert choose(COLOURS, "red", red=Red(3)).chosen == Red(3)


def test_choose_refuses_an_unknown_name() -> None:
    with pytest.raises(ConfigError, match="kind: expected one of red, blue, found 'green'"):
        choose(COLOURS, "green")


def test_choose_refuses_settings_of_an_unknown_member() -> None:
    with pytest.raises(ConfigError, match="green"):
        choose(COLOURS, "red", green=Red(3))


def test_equal_choices_have_equal_hashes() -> None:
    assert choose(COLOURS, "red", red=Red(3)) == choose(COLOURS, "red", red=Red(3))
    assert hash(choose(COLOURS, "red", red=Red(3))) == hash(choose(COLOURS, "red", red=Red(3)))
    assert choose(COLOURS, "red") != choose(COLOURS, "blue")
    assert choose(COLOURS, "red") != choose(COLOURS, "red", red=Red(3))


def test_walk_shows_what_is_in_force() -> None:
    assert list(walk(Outer())) == [
        ("size", 2),
        ("colour.kind", "red"),
        ("colour.red.depth", 1),
        ("inner.names", ("a",)),
    ]


def test_walk_shows_other_members_where_they_differ_from_their_defaults() -> None:
    plain = Outer(colour=choose(COLOURS, "blue"))
    changed = Outer(colour=choose(COLOURS, "blue", red=Red(3)))
    assert ("colour.red.depth", 1) not in list(walk(plain))
    assert ("colour.red.depth", 3) in list(walk(changed))


@given(st.floats(-2, 2), st.floats(-2, 2), st.floats(-2, 2))
def test_range_holds_its_ends(value: float, low: float, high: float) -> None:
    @dataclass(frozen=True)
    class Settings:
        number: float

    if low <= value <= high:
        require_range(Settings(value), "number", low, high)
    else:
        with pytest.raises(ConfigError, match=r"^number: expected a number between"):
            require_range(Settings(value), "number", low, high)


def test_range_refuses_not_a_number() -> None:
    with pytest.raises(ConfigError, match="found nan"):
        require_range(Red(float("nan")), "depth", 0)  # type: ignore[arg-type]


def test_require_says_expected_found_and_remedy() -> None:
    require(True, "key", expected="x", found=1)
    with pytest.raises(ConfigError, match=r"^key: expected x, found 'y'; do this\.$"):
        require(False, "key", expected="x", found="y", remedy="do this")


@pytest.mark.parametrize(
    ("table", "name"),
    [(table, name) for table in tables().values() for name in table.members],
    ids=lambda x: str(x)[:40],
)
def test_every_member_stands_by_its_defaults(table: Table, name: str) -> None:
    assert choose(table, name).chosen == table.members[name]()


def test_settings_are_frozen_and_hashable() -> None:
    config: Any = RunConfig()
    hash(config)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.rounds = 3
