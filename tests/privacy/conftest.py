from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from fedpeft.config import RunConfig, override
from fedpeft.experiment import resolve
from tests import tiny
from tests.privacy.sums import SECURE


@pytest.fixture
def plan(tiny_model: Path, tiny_rows: Path, tmp_path: Path) -> Callable[..., RunConfig]:
    def made(out: str, *overrides: str) -> RunConfig:
        config = tiny.run_config(tiny_model, tiny_rows, tmp_path / out)
        return resolve(override(config, [*SECURE, "rounds=2", *overrides]))

    return made
