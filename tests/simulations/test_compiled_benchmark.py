from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from simulations.benchmarks.compiled import measure
from tests import tiny


def test_compiled_steps_are_held_against_the_same_steps(
    tiny_model: Path, tiny_rows: Path, tmp_path: Path, one_thread: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def noted(model: Any, **more: Any) -> Any:
        backends.append(more["backend"])
        return compile_(model, **more)

    backends, compile_ = list[str](), torch.compile
    monkeypatch.setattr("torch.compile", noted)
    found = measure(tiny.run_config(tiny_model, tiny_rows, tmp_path), "aot_eager", 2)
    assert backends == ["aot_eager"] * 3
    assert len(found.plain) == len(found.compiled) == 2
    assert min(*found.plain, *found.compiled, found.first) > 0
