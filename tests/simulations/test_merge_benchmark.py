"""The benchmark's ways to merge against dense float64, and that it measures, judges and draws what it says."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from fedpeft.adapters import Factors
from fedpeft.report import drawing
from simulations.benchmarks import merge
from simulations.benchmarks.merge import Figures, Goal, Peak, Row
from simulations.benchmarks.ways import DENSE, EXACT, RANKS, SERVER_RANK, SPECTRA, WAYS, Cell, Outcome, Way, arriving

CELL = Cell(80, 7)


def exact_mean(cell: Cell) -> np.ndarray:
    found = [
        sent.share * sent.tensors["layer.B"].astype(np.float64) @ sent.tensors["layer.A"] for sent in arriving(cell)
    ]
    total: np.ndarray = np.sum(found, axis=0)
    return total


def best(matrix: np.ndarray) -> np.ndarray:
    u, values, vt = np.linalg.svd(matrix)
    nearest: np.ndarray = (u[:, :SERVER_RANK] * values[:SERVER_RANK]) @ vt[:SERVER_RANK]
    return nearest


def distance(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def outcome_of(name: str, cell: Cell) -> Outcome:
    return merge.merged(WAYS[name], cell)[2]


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize(
    ("name", "cut", "mean"),
    [(EXACT, 1e-7, 1e-14), (DENSE, 1e-4, 1e-6), ("peft svd", 1e-4, None), ("peft cat", None, 1e-6)],
)
def test_exact_ways_come_to_the_mean_of_products(
    name: str, cut: float | None, mean: float | None, spectrum: str
) -> None:
    cell = CELL._replace(spectrum=spectrum)
    exact, found = exact_mean(cell), outcome_of(name, cell)
    assert (found.cut is None, found.mean is None) == (cut is None, mean is None)
    if found.cut and cut:
        assert found.cut.rank == SERVER_RANK
        assert distance(found.cut.b.astype(np.float64) @ found.cut.a, best(exact)) < cut
    if found.mean and mean:
        assert distance(found.mean(), exact) < mean


def test_the_factor_mean_is_that_of_padded_factors() -> None:
    b, a = np.zeros((CELL.size, SERVER_RANK)), np.zeros((SERVER_RANK, CELL.size))
    for sent in arriving(CELL):
        rank = len(sent.tensors["layer.A"])
        b[:, :rank] += sent.share * sent.tensors["layer.B"]
        a[:rank] += sent.share * sent.tensors["layer.A"]
    found = outcome_of("factor mean", CELL)
    assert found.cut is not None
    assert found.mean is not None
    np.testing.assert_allclose(found.cut.b, b, atol=1e-6)
    np.testing.assert_allclose(found.cut.a, a, atol=1e-6)
    assert distance(found.mean(), b @ a) < 1e-6
    assert distance(found.mean(), exact_mean(CELL)) > 0.01


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_adapters_are_the_same_on_every_call_at_ranks_that_cycle(spectrum: str) -> None:
    cell = Cell(70, 7, spectrum)
    one, two = list(arriving(cell)), list(arriving(cell))
    assert [sent.tensors["layer.A"].shape for sent in one] == [(rank, 70) for rank in (*RANKS, *RANKS[:2])]
    assert sum(sent.share for sent in one) == pytest.approx(1.0)
    assert len({sent.share for sent in one}) > 1
    for first, second in zip(one, two, strict=True):
        for key, value in first.tensors.items():
            assert value.dtype == np.float32
            np.testing.assert_array_equal(value, second.tensors[key])


def test_clients_share_a_signal_that_decays_or_nothing() -> None:
    values = {name: np.linalg.svd(exact_mean(Cell(200, 40, name)), compute_uv=False) for name in SPECTRA}
    # All hold the first four directions, the fourth at a quarter of the first.
    assert values["decaying"][0] == pytest.approx(4 * values["decaying"][3], rel=0.15)
    assert values["decaying"][0] > 50 * values["decaying"][SERVER_RANK]
    assert values["flat"][0] < 3 * values["flat"][SERVER_RANK]


@pytest.mark.parametrize(("loads", "seconds"), [(False, 7 + 10), (True, 10)])
def test_only_what_a_way_does_with_adapters_is_timed(
    loads: bool, seconds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]

    def after(by: float, value: Any = None) -> Any:
        now[0] += by
        return value

    def drawn(size: int) -> Any:
        return lambda random, rank: after(1000.0, Factors(np.zeros((size, rank)), np.zeros((rank, size))))

    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setitem(SPECTRA, "late", drawn)
    way = Way(lambda _: after(100.0), lambda *_: after(1.0), lambda _: after(10.0, Outcome(None, None)), loads)
    assert merge.merged(way, Cell(8, 7, "late"))[0] == seconds


def held(wanted_bytes: int) -> float:
    """What `Peak` says when so many bytes are held for a moment, after twice as many were."""
    np.ones(wanted_bytes // 4)
    peak = Peak()
    peak.start()
    np.ones(wanted_bytes // 8)
    return peak.bytes()


def process(_: int) -> int:
    return os.getpid()


@pytest.mark.slow
def test_the_peak_is_what_was_held_since_the_start() -> None:
    assert merge.alone(held, 64 << 20) == pytest.approx(64 << 20, rel=0.1)


@pytest.mark.slow
def test_each_measurement_has_a_process_of_its_own() -> None:
    assert len({os.getpid(), *(merge.alone(process, at) for at in range(2))}) == 3
    with pytest.raises(BrokenProcessPool):
        merge.alone(os._exit, 1)


def test_the_reference_is_the_dense_mean_and_its_truncated_svd(tmp_path: Path) -> None:
    cell = Cell(80, 40)
    merge.reference(cell, tmp_path)
    exact = exact_mean(cell)
    assert distance(np.load(tmp_path / "mean.npy"), exact) < 1e-14
    assert distance(np.load(tmp_path / "cut.npy"), best(exact)) < 1e-12


def test_figures_are_held_against_the_reference(tmp_path: Path) -> None:
    merge.reference(CELL, tmp_path)
    exact = merge.measure(EXACT, CELL, tmp_path, 0.0)
    assert exact.cut_error < 1e-7
    assert exact.mean_error < 1e-14
    assert exact.seconds > 0
    np.save(tmp_path / "mean.npy", 4 * np.load(tmp_path / "mean.npy"))
    np.save(tmp_path / "cut.npy", 2 * np.load(tmp_path / "cut.npy"))
    planted = merge.measure(EXACT, CELL, tmp_path, 0.0)
    assert planted.cut_error == pytest.approx(1 / 2)
    assert planted.mean_error == pytest.approx(3 / 4)
    assert math.isnan(merge.measure("peft cat", CELL, tmp_path, 0.0).cut_error)
    assert math.isnan(merge.measure("peft svd", CELL, tmp_path, 0.0).mean_error)


@pytest.mark.parametrize(("name", "parts"), [("exact merge, cut", 1), ("factor mean", 2)])
def test_a_report_costs_its_fold_where_the_projection_has_no_need_of_it(
    name: str, parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks: Iterator[int] = iter(range(10**6))
    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks))
    assert merge.report_cost(name) == (1, parts)


def rows_of(
    fast: float = 0.4, faster: float = 1.8, memory: float = 110.0, error: float = 1e-6, spare: float = 1e-16
) -> list[Row]:
    """Rows in which the dense SVD takes 10 s, 100 clients take 100 bytes, and all goals are met."""
    found = [Row(Cell(4096, clients), DENSE, Figures(10.0, 1.0, 0.5, 0.5)) for clients in (10, 100)]
    exact = [(10, fast, 50.0, 0.0), (100, faster, 100.0, spare), (1000, 60.0, memory, spare)]
    return [*found, *(Row(Cell(4096, k), EXACT, Figures(s, size, error, mean)) for k, s, size, mean in exact)]


@pytest.mark.parametrize(
    ("changes", "missed"),
    [
        ({}, []),
        ({"fast": 0.5, "faster": 2.0, "memory": 120.0, "error": 1e-5}, []),
        ({"fast": 0.51}, [0]),
        ({"faster": 2.1}, [1]),
        ({"memory": 121.0}, [2]),
        ({"memory": math.nan}, [2]),
        ({"error": 1.1e-5}, [3]),
        ({"spare": 1.1e-5}, [3]),
    ],
)
def test_goals_are_judged_by_their_bounds(changes: dict[str, float], missed: list[int]) -> None:
    goals = merge.goals(rows_of(**changes))
    assert [at for at, goal in enumerate(goals) if not goal.met] == missed


def test_goals_give_their_figures() -> None:
    assert [goal.found for goal in merge.goals(rows_of())] == pytest.approx([25.0, 10 / 1.8, 1.1, 1e-6])
    assert not any(goal.met for goal in merge.goals([]))
    lines = [
        merge.goal_line(goal) for goal in (Goal("a", 7.0, least=5.0), Goal("b", 7.0, most=5.0), Goal("c", math.nan))
    ]
    assert [line.split()[0] for line in lines] == ["met", "MISSED", "not"]
    assert "7 " in lines[0]
    assert "(at least 5)" in lines[0]
    assert "(at most 5)" in lines[1]


def test_peft_declines_what_it_cannot_do_and_the_table_says_why() -> None:
    for name in ("peft svd", "peft cat"):
        assert not WAYS[name].declines(Cell(64, 100))
        assert "100 adapters" in WAYS[name].declines(Cell(64, 101))
    assert "takes about 120000000 GB" in WAYS["peft svd"].declines(Cell(10**7, 100))
    cell = Cell(64, 1000)
    why = WAYS["peft cat"].declines(cell)
    assert merge.row_line(Row(cell, "peft cat", None, why), None).split()[4:] == [*"—————", *f"left out: {why}".split()]


def test_the_table_has_each_figure_once() -> None:
    cell = Cell(64, 10)
    dense = Row(cell, DENSE, Figures(8.0, 1e6, 1e-6, math.nan))
    line = merge.row_line(Row(cell, EXACT, Figures(0.25, 3.5e6, 2.5e-8, 3e-16)), dense)
    assert line.split() == ["64", "10", "exact", "merge", "0.25", "s", "32.0", "×", "3.50", "MB", "2.5e-08", "3.0e-16"]
    assert merge.row_line(dense, dense).split()[-1] == "—"


def test_the_picture_has_a_panel_for_each_size_and_a_line_for_each_way(tmp_path: Path) -> None:
    ways = list(WAYS)
    rows = [
        Row(Cell(size, clients), way, Figures(clients * size * (1.0 + at), 0.0, 0.0, 0.0))
        for size in (64, 128)
        for clients in (10, 40)
        for at, way in enumerate(ways)
    ]
    rows.append(Row(Cell(128, 1000), ways[0], None, "too great"))
    figure = merge.picture(rows)
    assert [panel.get_title(loc="left") for panel in figure.axes] == ["n = 64", "n = 128"]
    for panel, size in zip(figure.axes, (64, 128), strict=True):
        drawn = sorted(np.asarray(line.get_data()).tolist() for line in panel.lines)
        assert drawn == [[[10, 40], [10 * size * (1.0 + at), 40 * size * (1.0 + at)]] for at in range(len(ways))]
        assert (panel.get_xscale(), panel.get_yscale()) == ("log", "log")
    assert sorted(text.get_text() for text in figure.legends[0].get_texts()) == sorted(ways)
    colors = {line.get_color() for line in figure.axes[0].lines}
    assert len(colors) == len(ways)
    drawing.write_picture(figure, tmp_path / "merge.png")
    assert (tmp_path / "merge.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_run_prints_all_of_it_and_fails_where_goals_are_not_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in merge.THREADS:
        monkeypatch.setenv(name, "1")
    app = typer.Typer()
    app.command()(merge.main)
    picture = tmp_path / "merge.svg"
    small = ["--size", "64", "--clients", "10", "--threads", "1"]
    quick = CliRunner().invoke(app, [*small, "--quick", "--spectrum", "flat", "--plot", str(picture)])
    assert quick.exit_code == 0, quick.output
    lines = quick.output.splitlines()
    assert f"{os.cpu_count()} CPUs, 1 threads" in lines[0]
    assert [line[16:28].strip() for line in lines if line.startswith("   64       10")] == list(WAYS)
    assert len([line for line in lines if "of it for the report" in line]) == 2
    assert [line.split()[0] for line in lines[-4:]] == ["not", "not", "not", "met"]
    assert "exact merge" in picture.read_text(encoding="utf-8")
    assert CliRunner().invoke(app, small).exit_code == 1
