from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedpeft.experiment import adapted_model
from fedpeft.runs import RunFolder
from simulations.benchmarks.overhead import bare_round, federated_round, measure
from tests import tiny


def test_both_sides_take_the_same_steps(
    tiny_model: Path, tiny_rows: Path, tmp_path: Path, one_thread: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny.run_config(tiny_model, tiny_rows, tmp_path)
    adapted = adapted_model(config)
    stepped: list[int] = []
    step = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, *a, **k: (stepped.append(1), step(self, *a, **k))[1])
    cohort = federated_round(config, adapted, RunFolder(tmp_path / "run"))
    federated = len(stepped)
    bare_round(config, adapted, cohort)
    assert federated == len(stepped) - federated == len(cohort) * config.training.steps


def test_it_measures_pairs_of_times(tiny_model: Path, tiny_rows: Path, tmp_path: Path, one_thread: None) -> None:
    config = tiny.run_config(tiny_model, tiny_rows, tmp_path)
    assert all(federated > 0 and bare > 0 for federated, bare in measure(config, 2))
