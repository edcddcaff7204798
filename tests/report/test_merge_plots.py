"""Plots of the merges: what is drawn is what the journal says, and what it does not say is not drawn."""

from __future__ import annotations

import pytest

from fedpeft.report.drawing import inline_svg
from fedpeft.report.history import history
from fedpeft.report.merge_plots import effective_rank_plot, merge_error_plot, merge_plots, residual_rank_plot


def run(tell, *figures, **config):
    """A run whose rounds say `figures` of their merges, one a round."""
    start, *rounds = tell(rounds=len(figures), bounds=False, ended=False)
    start["config"].update(config)
    return history([start, *({**record, **more} for record, more in zip(rounds, figures, strict=True))])


def names(plot):
    return [text.get_text() for text in plot.figure.legends[0].get_texts()]


def heights(line):
    return list(line.get_ydata())


def test_a_journal_that_measured_no_merge_shows_none(records, tell):
    assert merge_plots(history(records)) == []
    nothing = {"merge_error": None, "effective_ranks": {}, "residual_rank": None}
    assert merge_plots(run(tell, nothing, nothing)) == []
    assert merge_plots(run(tell, {"effective_ranks": {"q": None}})) == []


def test_the_error_of_the_merge_is_drawn_for_all_and_for_each_module(tell):
    figures = {"merge_error": 0.1, "merge_errors": {"q": 0.05, "v": None}}
    lines = merge_error_plot(run(tell, figures, figures)).figure.axes[0].lines
    assert list(map(heights, lines)) == [[0.05, 0.05], [], [0.1, 0.1]]


def test_a_round_without_an_error_is_a_gap_in_no_line(tell):
    plot = merge_error_plot(run(tell, {"merge_error": 0.1}, {"merge_error": None}, {"merge_error": 0.3}))
    (line,) = plot.figure.axes[0].lines
    assert list(line.get_xdata()) == [1, 3]
    assert names(plot) == ["all modules", "one module"]


def test_the_tail_is_drawn_beside_the_error(tell):
    measured = run(
        tell,
        {"merge_error": 0.4, "tail": 0.2},
        {"merge_error": 0.3, "tail": None},
        {"merge_error": 0.1, "tail": 0.05},
        **{"adapter.lora.rank": 8},
    )
    plot = merge_error_plot(measured)
    _, tail = plot.figure.axes[0].lines
    assert (list(tail.get_xdata()), heights(tail)) == ([1, 3], [0.2, 0.05])
    assert names(plot)[-1] == "tail: what no adapter of rank 8 can hold"


@pytest.mark.parametrize(("error", "top"), [(3e-16, 0.01), (0.4, 0.4)])
def test_rounding_does_not_fill_the_axis(error, top, tell):
    axes = merge_error_plot(run(tell, {"merge_error": error}, {"merge_error": error / 2})).figure.axes[0]
    assert axes.get_ylim()[0] == 0
    assert top <= axes.get_ylim()[1] < 1.2 * top


def test_effective_ranks_are_drawn_as_median_and_range_beneath_the_rank_of_the_server(tell):
    measured = run(
        tell,
        {"effective_ranks": {"a": 1.0, "b": 2.0, "c": 6.0}},
        {"effective_ranks": {"a": 2.0, "b": None, "c": 3.0}},
        **{"adapter.lora.rank": 8},
    )
    plot = effective_rank_plot(measured)
    axes = plot.figure.axes[0]
    median, level = axes.lines
    assert heights(median) == [2.0, 2.5]
    assert set(heights(level)) == {8}
    corners = axes.collections[0].get_paths()[0].vertices
    assert {tuple(corner) for corner in corners} == {(1, 1), (1, 6), (2, 2), (2, 3)}
    assert names(plot) == ["median of the modules", "all modules", "adapter's rank: 8"]


def test_the_rank_of_the_residual_is_drawn_beneath_its_budget(tell):
    budget = {"aggregation.merge.rule": "flora", "aggregation.merge.flora.budget": 20}
    measured = [{"residual_rank": 6.0}, {"residual_rank": 12.0}]
    plot = residual_rank_plot(run(tell, *measured, **budget))
    rank, level = plot.figure.axes[0].lines
    assert heights(rank) == [6, 12]
    assert set(heights(level)) == {20}
    assert names(plot) == ["the residual", "its budget: 20"]
    budget["aggregation.merge.flora.budget"] = 0
    assert names(residual_rank_plot(run(tell, *measured, **budget))) == ["the residual"]


def test_what_one_round_measured_can_be_seen(tell):
    plot = effective_rank_plot(run(tell, {"effective_ranks": {"a": 1.0, "b": 3.0}}))
    bars = plot.figure.axes[0].collections[1].get_segments()
    assert [[list(end) for end in bar] for bar in bars] == [[[1, 1], [1, 3]]]
    assert "<svg" in inline_svg(plot)
