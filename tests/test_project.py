"""The project's own files agree with each other."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from fedpeft.version import VERSION

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PINS = dict(
    line.split("==")
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    if line and not line.startswith("#")
)
TESTED_EXTRAS = ("simulation", "data", "dev")
REQUIREMENTS = [
    *PROJECT["dependencies"],
    *(text for extra in TESTED_EXTRAS for text in PROJECT["optional-dependencies"][extra]),
]


def test_one_version() -> None:
    assert PROJECT["version"] == VERSION


@pytest.mark.parametrize("text", REQUIREMENTS)
def test_tested_version_is_pinned_and_within_the_stated_range(text: str) -> None:
    requirement = Requirement(text)
    pins = {canonicalize_name(name): version for name, version in PINS.items()}
    assert pins[canonicalize_name(requirement.name)] in requirement.specifier


def test_pins_carry_no_build_label() -> None:
    assert [f"{name}=={version}" for name, version in PINS.items() if "+" in version] == []
