"""The world that the faults strike, and the in-process engine's fixtures, to compare with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engines.conftest import demo, in_process
from tests.faults.world import World, proxied

__all__ = ["demo", "in_process"]


@pytest.fixture(scope="package")
def world() -> Iterator[World]:
    with proxied() as found:
        yield found


@pytest.fixture(scope="package")
def calm(world: World) -> Path:
    """A run that nothing befell."""
    out = world.federation.lab.root / "calm"
    assert "cut off" not in world.run(out)
    return out
