"""The frontier's audit: it finds clients that nothing protects, and never proves more than the account says."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedpeft.config import to_toml
from fedpeft.errors import DataError
from fedpeft.experiment import deal_rows
from fedpeft.report.drawing import style
from fedpeft.sweeps.cells import cells_of
from fedpeft.sweeps.settings import read_plan
from fedpeft.sweeps.work import Row, finish
from simulations.privacy import frontier_plots
from simulations.privacy.frontier import MOST_OTHERS, outsiders
from tests import tiny

ROOT = Path(__file__).parents[3]
SWEEP = """
[sweep]
seeds = [7]
[sweep.axes.merge]
lora = []
[sweep.axes.epsilon]
none = []
2 = ["privacy.mechanism=central"]
[[sweep.grids]]
name = "audit"
axes = ["merge", "epsilon"]
measure = "simulations.privacy.frontier:membership"
"""


@pytest.fixture(scope="module")
def rows(tiny_model: Path, secrets: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    """Six clients learn two labels each that nothing but memory tells, with central noise and without."""
    folder = tmp_path_factory.mktemp("frontier")
    config = tiny.run_config(
        tiny_model,
        secrets,
        folder / "out",
        rounds=2,
        adapter={"family": "lora", "lora": {"rank": 8, "alpha": 16.0}},
        data={"partition": {"by": "iid", "most_rows": 2, "least_rows": 2}},
        federation={"clients": 6, "cohort": 6},
        training={"steps": 60, "batch_size": 2, "learning_rate": 0.03},
        aggregation={"merge": {"rule": "fedavg", "fedavg": {"weights": "uniform"}}},
        privacy={
            "central": {
                "noise_multiplier": 40.0,
                "clip_norm": 0.5,
                "delta": 1e-3,
                "sampler": "everyone",
                "entropy": "seed",
            }
        },
        evaluation={"every": 0},
    )
    path = folder / "frontier.toml"
    path.write_text(to_toml(config) + SWEEP)
    return [finish(cell) for cell in cells_of(read_plan(path))[1]]


def test_what_an_attack_proves_is_never_more_than_what_is_accounted_for(rows: list[Row]) -> None:
    free, private = frontier_plots.audits(rows)
    assert private.proved <= private.accounted < 1.0
    assert math.isinf(free.accounted)
    assert free.auc.value > max(0.7, private.auc.value)


def test_an_account_that_says_too_little_is_found_out() -> None:
    draw = np.random.default_rng(0)
    scores = {"scores": (draw.standard_normal(60) + 6).tolist(), "other_scores": draw.standard_normal(240).tolist()}
    figures = {**scores, "row_auc": 1.0, "delta": 1e-3, "epsilon": 0.5}
    (one,) = frontier_plots.audits([{"grid": "audit", "variants": {"merge": "x", "epsilon": "2"}, "figures": figures}])
    assert one.proved > 2 > one.accounted


def test_the_audited_clients_that_took_no_part_have_rows_that_nobody_had(
    tiny_model: Path, secrets: Path, tmp_path: Path
) -> None:
    data = {"partition": {"by": "iid", "most_rows": 3, "least_rows": 3}}
    config = tiny.run_config(tiny_model, secrets, tmp_path, data=data)
    sites = [list(site) for site in deal_rows(config).sites]
    others = outsiders(config, sites)
    mine, theirs = ({row.text for site in group for row in site} for group in (sites, others))
    assert len(others) == MOST_OTHERS * len(sites)
    assert not mine & theirs
    assert {len(site) for site in others} == {3}
    everything = tiny.run_config(tiny_model, secrets, tmp_path)
    with pytest.raises(DataError, match="most_rows"):
        outsiders(everything, [list(site) for site in deal_rows(everything).sites])


def test_every_plot_and_the_table_are_made_of_what_there_is(rows: list[Row], tmp_path: Path) -> None:
    told = {"recovered": 0.9, "words": 10, "words_over_rank": 2.0}
    cost = {"bytes_up_of_a_client": 5e4, "round_seconds": 0.5}
    more = [
        *rows,
        *({**row, "grid": "utility"} for row in rows),
        {"grid": "inversion", "variants": {"factors": "LoRA", "rank": "8"}, "figures": told},
        {"grid": "inversion-protected", "variants": {"protection": "secure-sums"}, "figures": told},
        *(
            {"grid": "costs", "variants": {"channel": kind, "cohort": "4"}, "figures": cost}
            for kind in ("plain", "secure")
        ),
    ]
    with style():
        frontier_plots.draw(rows, tmp_path / "few")
        frontier_plots.draw(more, tmp_path / "all")
    assert sorted(path.name for path in (tmp_path / "few").iterdir()) == [
        "frontier-attack.svg",
        "frontier-epsilon.svg",
        "frontier.md",
    ]
    assert len(list((tmp_path / "all").glob("*.svg"))) == 5
    text = (tmp_path / "all" / "frontier.md").read_text()
    assert "| lora | none |" in text
    assert "| LoRA, 8 | 90.0 | 10 | 2.00 |" in text
    assert "| secure, 4 | 50,000 | 0.50 |" in text


def test_the_published_frontier_is_a_plan_that_can_be_run() -> None:
    root, cells = cells_of(read_plan(ROOT / "simulations/privacy/frontier.toml"))
    assert root.name == "frontier"
    assert {cell.config.seed for cell in cells} == {7, 8, 9}
    by_grid: dict[str, Any] = {}
    for cell in cells:
        by_grid.setdefault(cell.grid, []).append(cell)
    assert set(by_grid) == {"utility", "audit", "inversion", "inversion-protected", "costs"}
    assert {len(group) for grid, group in by_grid.items() if grid in ("utility", "audit")} == {39}


def test_the_published_figures_keep_the_account() -> None:
    lines = (ROOT / "docs/privacy/frontier.jsonl").read_text().splitlines()
    found = frontier_plots.audits([json.loads(line) for line in lines])
    free = {one.merge: one.auc.value for one in found if one.asked == frontier_plots.FREE}
    assert set(free) == {"LoRA", "FFA-LoRA", "RoLoRA", "Fed-SB", "sketch"}
    assert max(free.values()) >= 0.9
    for one in found:
        assert one.proved <= one.accounted, one
        if one.asked != frontier_plots.FREE:
            assert one.auc.low < 0.6, one
            assert one.auc.value < free[one.merge], one
