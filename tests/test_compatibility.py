"""The table of what goes with what, against the laws and the README."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedpeft.compatibility import PROTECTIONS, compatible, table
from fedpeft.config.merges import MERGES

README = Path(__file__).parents[1] / "README.md"


def test_the_readme_shows_the_table_that_the_laws_give() -> None:
    columns, rows = table()
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join((f"`{name}`", *rest)) + " |" for name, *rest in rows]
    assert "\n".join(lines) in README.read_text(encoding="utf-8")


def test_every_rule_has_its_row() -> None:
    assert [row[0] for row in table()[1]] == list(MERGES.members)


@pytest.mark.parametrize("rule", ["flora", "fedex", "krum", "median"])
def test_what_must_see_each_update_never_goes_with_sums(rule: str) -> None:
    assert not any(compatible(rule, name) for name in PROTECTIONS if name not in ("local noise", "examples"))
    assert compatible(rule, "local noise")


def test_a_rule_that_needs_products_goes_with_sums_of_them_but_not_with_noise_on_them() -> None:
    with_sums = {name: compatible("flexlora", name) for name in PROTECTIONS}
    assert [name for name, holds in with_sums.items() if holds] == ["local noise", "examples", "secure sums"]
