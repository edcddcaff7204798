from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedpeft.config import from_tree
from fedpeft.config.observation import ObservationConfig
from fedpeft.sinks import KINDS, Sinks

Observe = Callable[..., Sinks]


@pytest.fixture
def observe(tmp_path: Path) -> Observe:
    """Sinks of a run in `tmp_path`, not begun: `observe("tensorboard", tensorboard={...})`."""

    def made(*names: str, kinds: Any = KINDS, **settings: Any) -> Sinks:
        tree = {"observation": {"sinks": list(names), **settings}}
        observation: ObservationConfig = from_tree(tree).observation
        return Sinks(observation, tmp_path, "demo", "0123456789abcdef", kinds)

    return made


@pytest.fixture
def warnings_told(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """What has been told of sinks so far."""
    caplog.set_level(logging.INFO, "fedpeft")
    return lambda: [record.getMessage() for record in caplog.records if record.name.startswith("fedpeft.sinks")]
