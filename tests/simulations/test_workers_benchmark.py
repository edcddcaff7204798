from __future__ import annotations

from pathlib import Path

from simulations.benchmarks.workers import BARE, measure, rows
from tests import tiny


def test_it_measures_each_way_beside_the_loop_and_puts_paired_ratios_in_rows(
    tiny_model: Path, tiny_rows: Path, tmp_path: Path, one_thread: None
) -> None:
    config = tiny.run_config(tiny_model, tiny_rows, tmp_path)
    ways = [(1, BARE), (1, "off"), (2, "on")]
    found = measure(config, ways, 3, 2)
    assert [list(each) for each in found] == [ways, [*ways[1:], ways[0]]]
    assert all(min(each.values()) > 0 for each in found)
    told = [
        {(1, BARE): 3.0, (2, BARE): 4.0, (1, "off"): 2.0, (2, "on"): 1.0},
        {(1, BARE): 12.0, (2, BARE): 10.0, (1, "off"): 5.0, (2, "on"): 2.0},
    ]
    assert rows(config, 6, told) == [
        "| 4 × 16 | 1 | bare | 1.25 | 0.92 |",
        "| 4 × 16 | 1 | off | 2.10 | 1.75 |",
        "| 4 × 16 | 2 | bare | 1.05 | 0.88 |",
        "| 4 × 16 | 2 | on | 4.50 | 4.00 |",
    ]
