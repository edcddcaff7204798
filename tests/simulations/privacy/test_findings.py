"""Findings go to a file that a journal's reader reads, and come back as they were."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from fedpeft import journal
from fedpeft.config import RunConfig, load, to_flat
from fedpeft.errors import ConfigError
from fedpeft.experiment import resolve
from fedpeft.runs import RunFolder, create
from fedpeft.sweeps.cells import cells_of
from fedpeft.sweeps.settings import is_sweep, read_plan
from simulations.privacy import findings
from simulations.privacy.figures import Interval
from simulations.privacy.findings import Finding

ROOT = Path(__file__).parents[3]


def test_findings_come_back_from_their_file(tmp_path: Path) -> None:
    made = [
        findings.found("inversion", "one client's delta", "words found", Interval(0.5, 0.4, 0.6), 30),
        findings.exactly("membership", "the final adapter", "ε proved", 1.25, 100),
    ]
    path = tmp_path / "found.jsonl"
    findings.write(path, made[:1], {"seed": 7})
    findings.write(path, made[1:], {"seed": 8})
    assert findings.read(path) == made
    records = journal.read(path)
    assert [record["event"] for record in records] == ["attack", "attack"]
    assert [record["seed"] for record in records] == [7, 8]
    assert records[0]["n"] == 30


def test_a_figure_that_is_none_comes_back_as_none(tmp_path: Path) -> None:
    path = tmp_path / "found.jsonl"
    findings.write(path, [Finding("a", "b", "c", math.nan, 0.0, 1.0, 0)], {})
    (found,) = findings.read(path)
    assert math.isnan(found.value)
    assert found.high == 1.0


@pytest.mark.parametrize("path", sorted((ROOT / "simulations/privacy").glob("*.toml")), ids=lambda path: path.name)
def test_the_settings_of_each_experiment_can_be_read_and_say_how_it_is_run(path: Path) -> None:
    configs = [cell.config for cell in cells_of(read_plan(path))[1]] if is_sweep(path) else [load(path)]
    assert {(config.name, config.compute.threads) for config in configs} == {(path.stem, 1)}
    ways = ("python -m simulations.privacy.", "fedpeft simulate ")
    commands = [line for line in path.read_text().splitlines() if any(way in line for way in ways)]
    assert commands
    assert all(path.name in line or "poisoning" in line for line in commands)


def test_a_report_of_the_attacked_run_tells_of_what_was_found(
    tiny_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    config = replace(resolve(tiny_config(seed=5)), out=str(tmp_path / "run"))
    folder = RunFolder(Path(config.out))
    create(folder, config)
    journal.append(folder.journal, {"event": "start", "config": to_flat(config)})
    assert findings.require_same(replace(config, seed=6), folder.root).root == folder.root
    one = findings.found("membership", "the final adapter", "area under the curve", Interval(0.71, 0.66, 0.75), 120)
    findings.report(folder, [one], {"seed": 6})
    page = (folder.root / "report.html").read_text()
    for told in ("What attacks found", "area under the curve", "0.71", "0.66 to 0.75", "<td>nothing</td>"):
        assert told in page, told
    for other in (tiny_config(seed=5, rounds=9), tiny_config(seed=5, training={"steps": 3})):
        with pytest.raises(ConfigError, match=r"--report: expected the settings of the run in .*found another"):
            findings.require_same(resolve(other), folder.root)


def test_the_table_has_a_line_for_each_finding() -> None:
    text = findings.table([Finding("a", "b", "c", 0.25, 0.125, 0.5, 8), Finding("a", "b", "d", 3.0, 3.0, 3.0, 8)])
    lines = text.splitlines()
    assert len(lines) == 4
    assert lines[2] == "| a | b | c | 0.250 | 0.125 to 0.500 | 8 |"
    assert lines[3] == "| a | b | d | 3.000 | – | 8 |"
