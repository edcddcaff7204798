from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from fedpeft.config import load
from fedpeft.experiment import deal_rows, resolve
from simulations.benchmarks import scale
from simulations.benchmarks.scale import Cost

FOUND = [
    {3: Cost(100e6, 0.1, 1.0), 12: Cost(110e6, 0.2, 2.0)},
    {3: Cost(200e6, 0.1, 1.0), 12: Cost(210e6, 0.1, 2.0)},
]


@pytest.fixture
def settings(tiny_run: str, tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(tiny_run.replace('columns = { group = "kind" }', "columns = {}"))
    return path


def test_runs_of_few_and_of_many_clients_are_processes_of_their_own(settings: Path) -> None:
    (found,) = scale.measured(settings, (2, 9), 1, ("rounds=4", "federation.cohort=2"))
    assert list(found) == [2, 9]
    assert all(10e6 < one.peak_bytes < 4e9 and 0 < one.update_seconds < one.seconds for one in found.values())


def test_a_run_that_fails_is_no_figure(settings: Path) -> None:
    with pytest.raises(subprocess.CalledProcessError):
        scale.alone(settings, 2, ("model.source=/nowhere",))


@pytest.mark.parametrize("clients", [3, 40])
def test_each_client_has_as_many_rows_whatever_their_number(settings: Path, tmp_path: Path, clients: int) -> None:
    scale.rows_of(load(settings, []), clients, tmp_path / "many.jsonl")
    texts = [json.loads(line)["text"] for line in (tmp_path / "many.jsonl").read_text().splitlines()]
    assert len(set(texts)) == len(texts)
    told = [f"federation.clients={clients}", f"data.origin.jsonl.path={tmp_path / 'many.jsonl'}"]
    dealt = deal_rows(resolve(load(settings, [*scale.SETTINGS, "federation.cohort=2", *told])))
    assert {len(rows) for rows in dealt.sites} == {scale.ROWS}
    assert len(dealt.test) == 20


def test_what_many_cost_is_held_against_few_in_the_same_repeat() -> None:
    assert scale.over(FOUND, 3, 12, "peak_bytes") == pytest.approx([1.1, 1.05])
    assert scale.over(FOUND, 3, 12, "update_seconds") == pytest.approx([2.0, 1.0])
    assert scale.lines(FOUND, 3)[1] == "| 12 | 160 MB | 1.08 × | 0.15 s | 1.50 × | 2.00 s |"


def test_the_picture_has_a_panel_for_memory_and_one_for_time_each_from_zero() -> None:
    memory, pace = scale.picture(FOUND).axes
    assert memory.get_ylim() == pytest.approx((0, 252))
    assert list(memory.lines[0].get_ydata()) == pytest.approx([150, 160])
    assert list(pace.lines[0].get_ydata()) == pytest.approx([100, 150])
