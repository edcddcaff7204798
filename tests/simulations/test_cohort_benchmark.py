from __future__ import annotations

from pathlib import Path

import pytest
import torch

from simulations.benchmarks.cohort import measure, row
from tests import tiny


def test_it_measures_three_ways_and_puts_ratios_in_a_row(
    tiny_model: Path, tiny_rows: Path, tmp_path: Path, one_thread: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny.run_config(tiny_model, tiny_rows, tmp_path)
    stepped: list[int] = []
    step = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, *a, **k: (stepped.append(1), step(self, *a, **k))[1])
    found = measure(config, 3, 2)
    # Once to warm up and twice: a step of all three together, of each one by one, and of each in the bare loop.
    assert len(stepped) == 3 * config.training.steps * (1 + 3 + 3)
    assert all(min(each) > 0 for each in found)
    assert row(config, 3, [(1.0, 2.0, 3.0), (2.0, 8.0, 10.0)]) == "| 4 × 16 | 3 | 4.5 | 1.9 | 1.3 | 3.00 | 4.00 |"
