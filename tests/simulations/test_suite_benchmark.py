from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import typer

from fedpeft import journal
from fedpeft.config import load, override
from fedpeft.errors import ConfigError
from fedpeft.experiment import resolve
from simulations.benchmarks import against_flower, merge, peak, scale, sent, sides, suite
from simulations.benchmarks.sides import OURS, Took
from simulations.benchmarks.suite import BEGIN, END, WORDS, Part, Ratio, Size
from simulations.benchmarks.ways import DENSE, EXACT, Cell
from simulations.benchmarks.workers import BARE


def row(method: str, codec: str, seed: int, accuracy: float, run: int) -> dict[str, Any]:
    figures = {"accuracy": accuracy, "bytes_up": run, "bytes_down": run, "bytes_run": 2 * run, "bytes_full": 100_000}
    figures |= {"bytes_2": run, "accuracy_2": accuracy - 0.004, "bytes_10": 2 * run, "accuracy_10": accuracy}
    return {"grid": "bytes", "variants": {"method": method, "codec": codec}, "seed": seed, "figures": figures}


ROWS = [
    row("LoRA", "float32", 7, 0.70, 500),
    row("LoRA", "few", 7, 0.69, 50),
    row("Thin", "few", 7, 0.68, 5),
    row("LoRA", "float32", 8, 0.70, 500),
    row("LoRA", "few", 8, 0.704, 40),
    row("Thin", "few", 8, 0.70, 5),
]


def part(**medians: float) -> Part:
    return Part({name: Ratio(median, median / 2, median * 2) for name, median in medians.items()}, ["| a |\n|---|"])


def test_bytes_are_those_of_the_fewest_that_learn_as_much() -> None:
    found = suite.told(sent.ways(ROWS))
    assert sent.best(sent.ways(ROWS)) == ("LoRA", "few")
    assert found.ratios["bytes_vs_lora_fp32"] == pytest.approx((11.25, 10.0, 12.5))
    assert found.ratios["bytes_vs_full"] == pytest.approx((1125.0, 1000.0, 1250.0))
    # On average they come to 69.5 % not after the second round, but after the last.
    assert "| LoRA, few | 45 B | 45 B | 11.2 × | 1,125 × | 90 B | 69.7 % (69.0 % to 70.4 %) |" in found.tables[0]
    assert "| LoRA, float32 | 500 B | 500 B | 1.00 × | 100 × | 500 B | 70.0 % (70.0 % to 70.0 %) |" in found.tables[0]


def test_where_nothing_else_learns_as_much_nothing_is_saved() -> None:
    worse = [row("LoRA", "float32", 7, 0.70, 500), row("LoRA", "few", 7, 0.60, 5)]
    assert suite.told(sent.ways(worse)).ratios["bytes_vs_lora_fp32"].median == 1.0


def test_the_front_are_those_that_none_beats_in_both() -> None:
    found = sent.ways([*ROWS, row("Thick", "few", 7, 0.69, 400), row("Thick", "few", 8, 0.69, 400)])
    assert sent.front(found) == [("Thin", "few"), ("LoRA", "few"), ("LoRA", "float32")]
    shown = [text.get_text() for text in sent.picture(found).legends[0].get_texts()]
    assert shown == ["LoRA", "Thin", "Thick", "float32", "few"]


def test_a_run_tells_its_bytes_both_ways_and_how_accurate_it_was_when(tmp_path: Path) -> None:
    each = {"run": {"up": 1, "down": 2}, "dense": {"up": 30, "down": 40}, "full": {"up": 500, "down": 600}}
    for number, evaluation in ((1, None), (2, {"accuracy": 0.5})):
        record = {"event": "round", "round": number, "bytes_up": 10, "bytes_down": 5, "evaluation": evaluation}
        journal.append(tmp_path / "journal.jsonl", record)
    journal.append(tmp_path / "journal.jsonl", {"event": "end", "traffic": {"bytes": each}})
    assert sent.sent(tmp_path) == {"bytes_2": 30, "accuracy_2": 0.5, "bytes_run": 3, "bytes_full": 1100}


def test_speed_is_that_of_the_best_setting_in_the_size_of_batch_that_it_gains_least_in(
    tiny_run: str, tmp_path: Path, one_thread: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = tmp_path / "run.toml"
    settings.write_text(tiny_run)
    monkeypatch.setattr(suite, "EDGE", ((1, 8), (2, 8)))
    monkeypatch.setattr(suite, "OTHER", ((2, 16),))
    found = suite.speed(settings, Size(2, 3, 2, ("training.steps=1",), ((1, BARE), (1, "off"), (1, "on"))))
    assert list(found.ratios) == ["edge_vs_bare_loop", "any_vs_bare_loop", "useful_flops"]
    assert found.ratios["useful_flops"].most < 1
    assert all(0 < one.least <= one.median <= one.most for one in found.ratios.values())
    assert [line.split(" | ")[:3] for line in found.tables[0].splitlines()[2:5]] == [
        ["| 1 × 8", "1", how] for how in (BARE, "off", "on")
    ]
    assert len(found.tables[0].splitlines()) == 2 + 9
    assert [line.split(" | ")[0] for line in found.tables[1].splitlines()[2:]] == ["| 1 × 8", "| 2 × 8", "| 2 × 16"]


def test_operations_are_those_of_matrix_products_forward_and_back_to_the_lowest_adapter(
    tiny_run: str, tmp_path: Path, one_thread: None
) -> None:
    (tmp_path / "run.toml").write_text(tiny_run)
    config = resolve(override(load(tmp_path / "run.toml", []), ["training.steps=1", "training.batch_size=2"]))
    once = peak.operations(config, 1)
    assert peak.operations(override(config, ["training.steps=3"]), 1) > 2 * once
    assert peak.operations(config, 2) > 1.5 * once
    upper = peak.operations(resolve(override(config, ["adapter.lora.layers=1"])), 1)
    assert upper < 0.8 * once


def test_the_peak_is_more_than_one_product_reaches() -> None:
    assert peak.peak(1) >= 0.7 * peak._rate(64, 64, 64) > 0


def test_both_sides_are_timed_as_whole_processes_and_by_their_own_rounds(
    tiny_run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run.toml").write_text(tiny_run)
    config = sides.task(load(tmp_path / "run.toml", []), 3, ["compute.cohort=off"])
    own = sides.ours(config, tmp_path)
    assert 0 < own.warm < own.whole

    def said(command: list[str], home: Path) -> tuple[float, str]:
        return 40.0, 'noise\n{"rounds": [1.0, 21.0, 24.0, 28.0], "whole": 30.0}'

    monkeypatch.setattr(sides, "process", said)
    other = against_flower.flowers(config, tmp_path)
    assert other == Took(40.0, 3.5)
    found = [{against_flower.FLOWER: other, OURS: Took(2.0, 0.5)}]
    assert sides.over(found) == {"whole": [20.0], "warm": [7.0]}
    assert sides.rows("demo", found)[0] == "| demo | Flower, Ray, a model a message | 40.0 | 3.50 |"


def test_a_process_that_fails_is_told_with_its_last_words(tmp_path: Path) -> None:
    with pytest.raises(typer.BadParameter, match=r"nowhere failed: .*No module named nowhere"):
        sides.process(["-m", "nowhere"], tmp_path)


@pytest.mark.engines
def test_the_usual_flower_app_trains_in_every_round(tiny_run: str, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(tiny_run)
    found = against_flower.flowers(sides.task(load(tmp_path / "run.toml", []), 3), tmp_path)
    assert 0 < found.warm < found.whole


def test_a_merge_is_held_against_the_dense_one_of_the_same_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Cell] = []

    def measured(cells: list[Cell], _seconds: float) -> list[merge.Row]:
        asked.extend(cells)
        return [
            merge.Row(cells[0], way, merge.Figures(seconds, 0, 0, 0)) for way, seconds in ((DENSE, 6.0), (EXACT, 0.5))
        ]

    monkeypatch.setattr(merge, "measured", measured)
    assert suite.merging(Path("none"), suite.FULL).ratios["merge_vs_dense_4096"].median == 12.0
    assert [cell.size for cell in asked] == [4096]


def test_a_part_measured_anew_leaves_the_others_as_they_were() -> None:
    first = suite.results({"merge": part(merge_vs_dense_4096=30.0), "bytes": part(bytes_vs_full=9.0)})
    second = json.loads(json.dumps(suite.results({"bytes": part(bytes_vs_full=7.0)}, first)))
    assert second["ratios"] == {"merge_vs_dense_4096": 30.0, "bytes_vs_full": 7.0}
    assert second["spread"]["bytes_vs_full"] == {"least": 3.5, "most": 14.0}
    assert set(second["tables"]) == {"merge", "bytes"}
    assert second["versions"]["torch"]


@pytest.mark.parametrize("before", [f"# A\n{BEGIN}\nold\n{END}\nB\n", f"# A\n{BEGIN}{END}\nB\n"])
def test_the_table_stands_between_its_marks_and_nothing_else_is_touched(before: str) -> None:
    found: Mapping[str, Any] = suite.results({"merge": part(merge_vs_dense_4096=30.0)})
    text = suite.put(before, found)
    assert text.startswith(f"# A\n{BEGIN}\n| figure ")
    assert text.endswith(f"\n{END}\nB\n")
    assert "old" not in text
    assert f"| {WORDS['merge_vs_dense_4096']} | 30.0 × | 15.0 × to 60.0 × |" in text
    assert suite.put(text, found) == text


def test_a_page_without_marks_is_left_alone_in_one_sentence() -> None:
    with pytest.raises(ConfigError, match=r"README\.md: expected <!-- benchmarks: begin -->"):
        suite.put("# A\n", suite.results({}))


def test_ten_thousand_clients_are_held_against_a_hundred(monkeypatch: pytest.MonkeyPatch) -> None:
    costs = {10: scale.Cost(1e8, 0.1, 1), 100: scale.Cost(1e8, 0.1, 1), 1000: scale.Cost(1e8, 0.1, 1)}
    each = [{**costs, 10_000: scale.Cost(peak, 0.2, 9)} for peak in (1.05e8, 1.2e8, 1e8)]
    monkeypatch.setattr(scale, "measured", lambda _settings, _clients, repeats: each[:repeats])
    found = suite.scaling(Path("none"), suite.FULL)
    assert found.ratios["scale_memory_10000_vs_100"] == pytest.approx((1.05, 1.0, 1.2))
    assert found.ratios["scale_time_10000_vs_100"].median == pytest.approx(2.0)
    assert found.tables[0].splitlines()[-1].startswith("| 10,000 | 105 MB | 1.05 × | 0.20 s | 2.00 × |")
    assert found.picture is not None


def test_the_readme_shows_the_figures_that_were_kept_and_each_has_words() -> None:
    committed = json.loads(Path("results/two-cores.json").read_text(encoding="utf-8"))
    text = Path("README.md").read_text(encoding="utf-8")
    assert set(committed["ratios"]) <= set(WORDS)
    assert suite.put(text, committed) == text
