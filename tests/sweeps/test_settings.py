"""What may stand in [sweep], what it unfolds to, and how a mistake is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedpeft.errors import ConfigError
from fedpeft.sweeps.cells import cells_of
from fedpeft.sweeps.settings import is_sweep, read_plan

GOOD = """
rounds = 3
[sweep]
seeds = [1, 2]
[sweep.axes.rule]
fedavg = []
ffa = ["aggregation.merge.rule=ffa_lora"]
[sweep.axes.rate]
slow = ["training.learning_rate=1e-3"]
fast = ["training.learning_rate=1e-2"]
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "sweep.toml"
    path.write_text(text)
    return path


def test_every_combination_of_variants_and_seeds_is_a_cell_with_its_settings(tmp_path: Path) -> None:
    path = written(tmp_path, GOOD)
    root, cells = cells_of(read_plan(path), ["rounds=5", f"out={tmp_path / 'out'}"])
    assert is_sweep(path)
    assert root == tmp_path / "out"
    assert len(cells) == len({cell.folder for cell in cells}) == 8
    last = cells[-1]
    assert last.variants == (("rule", "ffa"), ("rate", "fast"))
    assert (last.config.seed, last.config.rounds, last.config.training.learning_rate) == (2, 5, 1e-2)
    assert last.config.aggregation.merge.name == "ffa_lora"
    assert last.folder.parent == root / "cells"


def test_a_change_of_one_variant_leaves_the_folders_of_the_others(tmp_path: Path) -> None:
    before = {c.folder.name for c in cells_of(read_plan(written(tmp_path, GOOD)))[1]}
    after = {c.folder.name for c in cells_of(read_plan(written(tmp_path, GOOD.replace("1e-2", "2e-2"))))[1]}
    assert len(before & after) == 4
    assert all("slow" in name for name in before & after)


def test_grids_choose_their_axes_and_share_settings(tmp_path: Path) -> None:
    text = f'{GOOD}[[sweep.grids]]\nname = "one"\naxes = ["rate"]\nset = ["rounds=9"]\n[[sweep.grids]]\nname = "two"\n'
    cells = cells_of(read_plan(written(tmp_path, text), ["sweep.seeds=4"]))[1]
    assert [(cell.grid, cell.config.rounds, cell.config.seed) for cell in cells] == [
        ("one", 9, 4),
        ("one", 9, 4),
        ("two", 3, 4),
    ]


def test_what_is_omitted_is_not_run(tmp_path: Path) -> None:
    grid = '[[sweep.grids]]\naxes = ["rule", "rate"]\nomit = ["ffa slow", "fedavg fast"]\n'
    cells = cells_of(read_plan(written(tmp_path, GOOD + grid), ["sweep.seeds=4"]))[1]
    assert [tuple(name for _, name in cell.variants) for cell in cells] == [("fedavg", "slow"), ("ffa", "fast")]


@pytest.mark.parametrize(
    ("text", "place", "words"),
    [
        ("sweep = 3", "sweep", "expected a table"),
        ("[sweep]\nworkers = 0", "sweep.workers", "found 0"),
        ("[sweep]\nworker = 2", "sweep.worker", "did you mean workers"),
        ("[sweep]\nseeds = ['x']", "sweep.seeds", "'x'"),
        ("[sweep]\ndraw = 'os.system'", "sweep.draw", "module:function"),
        ("[sweep.axes]\nrate = 3", "sweep.axes.rate", "expected a table"),
        ("[sweep.axes.rate]", "sweep.axes.rate", "found none"),
        ("[sweep.axes.rate]\nslow = 'rounds=3'", "sweep.axes.rate.slow", "a list of settings"),
        ("[sweep.axes.rate]\n'../x' = []", "sweep.axes.rate.../x", "letters"),
        ("[sweep]\ngrids = []", "sweep.grids", "at least one"),
        ("[[sweep.grids]]\naxes = ['rate']", "sweep.grids[0].axes", "'rate'"),
        ("[[sweep.grids]]\n[[sweep.grids]]", "sweep.grids[1].name", "'runs'"),
        (
            "[sweep.axes.rate]\nslow = []\n[[sweep.grids]]\naxes = ['rate']\nomit = ['slo']",
            "sweep.grids[0].omit",
            "such as 'slow', found 'slo'",
        ),
        (
            "[sweep.axes.rate]\nslow = []\n[[sweep.grids]]\naxes = ['rate']\nomit = ['slow']",
            "sweep.grids[0].omit",
            "some combination left",
        ),
        ("[sweep.axes.rate]\nslow = ['training.learning_rat=3']", "sweep cell runs slow", "learning_rate"),
    ],
)
def test_a_mistake_is_told_in_one_sentence_that_names_its_place(
    tmp_path: Path, text: str, place: str, words: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        cells_of(read_plan(written(tmp_path, text)))
    said = str(caught.value)
    assert said.startswith(place)
    assert words in said
    assert "\n" not in said


def test_a_sweep_is_no_part_of_a_runs_settings(tmp_path: Path) -> None:
    from fedpeft.config import load

    with pytest.raises(ConfigError, match="unknown key 'sweep'"):
        load(written(tmp_path, GOOD))
