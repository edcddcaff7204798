from __future__ import annotations

from pathlib import Path

import pytest

from fedpeft import journal
from fedpeft.config import RunConfig, override
from fedpeft.experiment import adapted_model, resolve
from fedpeft.runs import RunFolder
from simulations.benchmarks.central_privacy import METHODS, NOISE, accounting_seconds, measure
from simulations.benchmarks.overhead import federated_round
from tests import tiny

pytestmark = pytest.mark.usefixtures("one_thread")


def sides(tiny_model: Path, tiny_rows: Path, folder: Path, method: str) -> tuple[RunConfig, RunConfig]:
    made = tiny.run_config(tiny_model, tiny_rows, folder)
    everyone = [*METHODS[method], f"federation.cohort={made.federation.clients}"]
    return resolve(override(made, [*everyone, *NOISE])), resolve(override(made, everyone))


@pytest.mark.parametrize("method", METHODS)
def test_both_sides_train_the_same_sites_and_one_gets_noise(
    tiny_model: Path, tiny_rows: Path, tmp_path: Path, method: str
) -> None:
    found = {}
    for name, config in zip(("private", "plain"), sides(tiny_model, tiny_rows, tmp_path, method), strict=True):
        folder = RunFolder(tmp_path / name)
        cohort = federated_round(config, adapted_model(config), folder)
        found[name] = cohort, journal.read(folder.journal)[-1]
    assert found["private"][0] == found["plain"][0]
    assert found["private"][1]["noise_deviation"] > 0
    assert "noise_deviation" not in found["plain"][1]


def test_it_measures_pairs_of_times_and_the_account(tiny_model: Path, tiny_rows: Path, tmp_path: Path) -> None:
    private, plain = sides(tiny_model, tiny_rows, tmp_path, "ffa_lora")
    assert all(one > 0 and other > 0 for one, other in measure(private, plain, 2))
    assert accounting_seconds(private) > 0
    assert accounting_seconds(plain) == 0
