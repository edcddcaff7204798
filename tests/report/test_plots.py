"""Plots: drawn for every shape of journal, readable as SVG, without a colliding id or anything from elsewhere."""

from __future__ import annotations

import re
import sys
from xml.etree import ElementTree

import numpy as np
import pytest

from fedpeft.errors import FedPeftError
from fedpeft.report.drawing import Plot, inline_svg, label, write_picture
from fedpeft.report.history import history
from fedpeft.report.plots import (
    comparison_plots,
    drift_plot,
    group_metric_plot,
    metric_plot,
    plots,
    round_plots,
)
from fedpeft.report.sites import participation_plot, partition_picture

WHOLE = {
    "accuracy", "group-accuracy", "loss", "drift", "bytes", "bytes-total", "partitions", "participation"
}  # fmt: skip


def bars(figure):
    """(left, width) of every bar of the first panel."""
    corners = [path.vertices[:, 0] for kind in figure.axes[0].collections for path in kind.get_paths()]
    return [(float(across.min()), float(np.ptp(across))) for across in corners]


def named(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_a_whole_run_shows_every_plot(records):
    assert {plot.name for plot in plots(records)} == WHOLE


@pytest.mark.parametrize(
    ("shape", "missing"),
    [
        ({"rounds": 0, "bounds": False, "ended": False}, WHOLE - {"partitions"}),
        ({"grouped": False}, {"group-accuracy"}),
        ({"evaluated": False, "bounds": False}, {"accuracy", "group-accuracy"}),
    ],
)
def test_what_was_not_measured_is_not_drawn(tell, shape, missing):
    assert {plot.name for plot in plots(tell(**shape))} == WHOLE - missing


def test_every_shape_of_journal_draws_well_formed_svg_with_ids_of_its_own(any_records):
    drawn = [inline_svg(plot) for plot in plots(any_records)]
    ids = [found for svg in drawn for found in re.findall(r'\bid="([^"]+)"', svg)]
    assert len(ids) == len(set(ids))
    for svg in drawn:
        root = ElementTree.fromstring(svg)
        targets = re.findall(r'(?:url\(|href=")#([^")]+)', svg)
        assert root.tag == "svg"
        assert set(targets) <= set(ids)
        assert "http" not in svg
        assert "<style" not in svg


def test_the_same_journal_draws_the_same_svg(records):
    assert list(map(inline_svg, plots(records))) == list(map(inline_svg, plots(records)))


def test_accuracy_is_drawn_as_measured_with_a_line_for_each_bound(records):
    run = history(records)
    curve, *bounds = metric_plot(run).figure.axes[0].lines
    assert list(curve.get_xdata()) == list(range(1, 11))
    assert list(curve.get_ydata()) == [record["evaluation"]["accuracy"] for record in run.rounds]
    assert [line.get_ydata()[0] for line in bounds] == [0.602, 0.587, 0.741]
    assert named(metric_plot(run).figure)[-1] == "pooled data: 74.1 %"


def test_a_null_leaves_a_gap_and_no_warning(tell):
    records = tell(rounds=3, bounds=False, ended=False)
    records[2] = {**records[2], "drift": None, "update_norm": None, "loss": None}
    drift = drift_plot(history(records)).figure.axes[1].lines[0].get_ydata()
    assert [value == value for value in drift] == [True, False, True]
    assert all(inline_svg(plot) for plot in plots(records))


def test_a_site_bar_is_as_long_as_its_rows_and_groups_stand_together(records):
    partitions = records[0]["partitions"]
    figure = partition_picture(partitions, records[0]["labels"])
    axes = figure.axes[0]
    assert sum(width for _, width in bars(figure)) == sum(partition["rows"] for partition in partitions)
    assert [int(text.get_text()) for text in axes.get_yticklabels()] == [0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11]
    assert [text.get_text() for text in axes.texts] == ["films", "microblog", "newspaper", "shops"]
    assert named(figure) == ["negative", "neutral", "positive"]


def test_a_thousand_sites_are_drawn_by_few_artists():
    partitions = [{"partition": n, "rows": 2, "labels": {"a": 1, "b": 1}, "groups": {}} for n in range(1000)]
    figure = partition_picture(partitions, ["a", "b"])
    assert len(bars(figure)) == 2000
    assert len(figure.axes[0].get_children()) < 100


def test_sites_that_mix_groups_get_a_second_panel(tell):
    start = tell(mixed=True)[0]
    figure = partition_picture(start["partitions"], start["labels"])
    assert len(figure.axes) == 2
    assert named(figure)[3:] == ["films", "microblog", "newspaper", "shops"]


def test_many_labels_are_drawn_as_the_most_frequent_and_the_others():
    counts = {f"label {number}": number + 1 for number in range(77)}
    figure = partition_picture([{"partition": 0, "rows": 3003, "labels": counts, "groups": {}}], list(counts))
    assert named(figure)[-1] == "others"
    assert len(named(figure)) == 10
    assert sum(width for _, width in bars(figure)) == 3003


@pytest.mark.parametrize("partitions", [[], [{"partition": 0, "rows": 0, "labels": {}, "groups": {}}]])
def test_a_picture_of_nothing_is_still_a_picture(partitions, tmp_path):
    write_picture(partition_picture(partitions, []), tmp_path / "who.png")
    assert (tmp_path / "who.png").read_bytes().startswith(b"\x89PNG")


def test_failures_are_marked_where_they_fell(records):
    answered, failed = participation_plot(history(records)).figure.axes[0].lines
    assert len(answered.get_xdata()) == 58
    assert list(zip(failed.get_xdata(), failed.get_ydata(), strict=True)) == [(3, 2), (6, 3)]


def test_runs_are_compared_over_rounds_and_over_bytes(tell):
    runs = {"short": tell(rounds=2), "long": tell(rounds=5), "blind": tell(evaluated=False, bounds=False)}
    over_rounds, over_bytes = comparison_plots(runs)
    assert [len(line.get_xdata()) for line in over_rounds.figure.axes[0].lines] == [2, 5]
    assert over_bytes.figure.axes[0].lines[0].get_xdata()[0] == 6 * (593_400 + 593_700)
    assert comparison_plots({"blind": runs["blind"]}) == []


@pytest.mark.parametrize("name", ["$x_{$", "_hidden", "影評", "<b>&\"'", "a\nb\x00\x0b", "x" * 200, "\ud800", ""])
def test_any_name_can_be_drawn(name, records):
    partitions = [{**partition, "groups": {name: partition["rows"]}} for partition in records[0]["partitions"]]
    rounds = [
        {**record, "evaluation": {**record["evaluation"], "groups": {name: record["evaluation"]}}}
        for record in records[1:4]
    ]
    drawn = [Plot("sites", name, name, partition_picture(partitions, [name]))]
    drawn.append(group_metric_plot(history([records[0], *rounds])))
    for plot in drawn:
        ElementTree.fromstring(inline_svg(plot))


def test_a_label_is_one_short_line():
    assert label("a \n b\tc") == "a b c"
    assert label("x" * 50, 10) == "xxxxxxxxx…"


@pytest.mark.parametrize(("ending", "opening"), [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF")])
def test_a_picture_is_written_in_the_format_of_its_name_and_always_alike(ending, opening, records, tmp_path):
    paths = [tmp_path / f"{number}{ending}" for number in range(2)]
    for path in paths:
        write_picture(partition_picture(records[0]["partitions"], records[0]["labels"]), path)
    first, second = (path.read_bytes() for path in paths)
    assert first.startswith(opening)
    assert first == second


def test_another_picture_format_is_refused_in_one_sentence(records, tmp_path):
    with pytest.raises(FedPeftError, match=r"who\.gif: expected a name that ends with \.png, \.svg, \.pdf"):
        write_picture(partition_picture(records[0]["partitions"], []), tmp_path / "who.gif")
    assert list(tmp_path.iterdir()) == []


def test_drawing_needs_no_pyplot(records):
    plots(records)
    assert "matplotlib.pyplot" not in sys.modules


def ranks_beside(figure):
    """The names on the right-hand axis, by height; nothing where there is no such axis."""
    return {
        tick: label.get_text()
        for axis in figure.axes[0].child_axes
        for tick, label in zip(axis.get_yticks(), axis.get_yticklabels(), strict=True)
    }


def test_unlike_ranks_stand_beside_the_sites_that_have_them(tell):
    records = tell(merges=True, sites=4, cohort=4, rounds=2, failures=False)
    records[2]["clients"][3]["rank"] = 1
    assert ranks_beside(participation_plot(history(records)).figure) == {0: "2", 1: "4", 2: "8", 3: "2 → 1"}


@pytest.mark.parametrize("rank", [0, 8])
def test_ranks_that_are_all_alike_are_not_shown(rank, tell):
    records = tell(merges=True)
    for record in records:
        for client in record.get("clients", ()):
            client["rank"] = rank
    run = history(records)
    assert ranks_beside(participation_plot(run).figure) == {}
    assert {known for of_site in run.ranks.values() for known in of_site} == {rank} - {0}


def test_a_site_that_never_answered_has_no_rank(tell):
    records = tell(merges=True, sites=3, cohort=3, rounds=1, failures=False)
    records[1]["clients"] = records[1]["clients"][:2]
    assert ranks_beside(participation_plot(history(records)).figure) == {0: "2", 1: "4"}


def test_ranks_beside_many_sites_do_not_run_together(tell):
    beside = ranks_beside(participation_plot(history(tell(merges=True, sites=150, cohort=40, rounds=60))).figure)
    assert len(beside) == 38
    assert set(beside.values()) == {"2", "4", "8"}


def test_all_plots_are_those_of_the_rounds_and_those_of_the_merges(tell):
    records = tell(merges=True)
    assert {plot.name for plot in round_plots(history(records))} == WHOLE
    assert [plot.name for plot in plots(records)[len(WHOLE) :]] == ["merge-error", "effective-rank", "residual-rank"]
