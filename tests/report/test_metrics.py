from __future__ import annotations

import pytest

from fedpeft.config.training import METRICS as WATCHED
from fedpeft.report.history import history
from fedpeft.report.metrics import METRICS, metric
from fedpeft.report.page import render_comparison, render_page
from fedpeft.report.plots import comparison_plots, round_plots
from fedpeft.report.tables import comparison_table, summary_table


def test_every_metric_that_a_run_can_watch_is_told():
    assert set(METRICS) == set(WATCHED)


@pytest.mark.parametrize(
    ("name", "value", "spread", "said"),
    [
        ("accuracy", 0.7125, None, "71.2 %"),
        ("entity_f1", 0.5, 0.02, "50.0 ± 2.0 %"),
        ("perplexity", 12.3456, None, "12.35"),
        ("perplexity", 12.3456, 0.456, "12.35 ± 0.46"),
        ("perplexity", 123456.0, None, "1.235e+05"),
        ("margin", -0.25, None, "-0.25"),
        ("loss", None, None, "–"),
        ("accuracy", None, None, "–"),
        ("of_tomorrow", 3.0, None, "3"),
    ],
)
def test_a_figure_is_told_as_what_it_is(name, value, spread, said):
    assert metric(name).text(value, spread) == said


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("accuracy", 0.052, "5.2 points above"),
        ("perplexity", -1.234, "1.23 below"),
        ("margin", 0.5, "0.5 above"),
        ("loss", 0.0, "level with"),
    ],
)
def test_a_difference_is_told_as_what_it_is(name, value, said):
    assert metric(name).difference(value) == said


@pytest.fixture
def perplexed(records):
    """The made-up run, told by a perplexity of ten times one less the accuracy."""

    def told(evaluation):
        if not evaluation:
            return evaluation
        groups = {name: told(group) for name, group in evaluation.get("groups", {}).items()}
        kept = {key: value for key, value in evaluation.items() if key not in ("accuracy", "macro_f1", "groups")}
        return {**kept, "perplexity": 10 * (1 - evaluation["accuracy"]), "groups": groups}

    start, *others = records
    changed = [{**record, "evaluation": told(record.get("evaluation"))} for record in others]
    for record in changed:
        if record["event"] == "bounds":
            record["rows"] = [{**row, "evaluation": told(row["evaluation"])} for row in record["rows"]]
    partitions = [{**partition, "labels": {}} for partition in start["partitions"]]
    config = {**start["config"], "evaluation.metric": "perplexity"}
    return [{**start, "config": config, "labels": [], "partitions": partitions}, *changed]


def test_a_report_is_told_by_the_runs_metric(perplexed):
    table = summary_table(perplexed)
    assert table.columns[1] == "perplexity"
    assert table.rows[0][1] == "2.875"
    assert table.rows[3][1] == "2.59"
    plots = {plot.name: plot for plot in round_plots(history(perplexed))}
    assert {"perplexity", "group-perplexity", "partitions"} <= set(plots)
    (axes,) = plots["perplexity"].figure.axes
    assert axes.lines[0].get_ydata()[-1] == pytest.approx(2.8745, abs=1e-4)
    assert "%" not in axes.yaxis.get_major_formatter()(2.5, 0)
    assert plots["partitions"].figure.axes[0].get_xlabel() == "rows"
    said = render_page(perplexed)
    assert "the model has a perplexity of 2.875 on 1,200 held-out rows" in said
    assert "0.285 above “pooled data”" in said
    assert "ccuracy" not in said


def test_runs_are_compared_by_the_first_ones_metric(perplexed, records):
    both = {"one": perplexed, "other": records}
    table = comparison_table(both)
    assert table.columns[3] == "perplexity"
    assert [row[3] for row in table.rows] == ["2.875", "–"]
    assert [plot.name for plot in comparison_plots(both)] == ["perplexity", "perplexity-bytes"]
    assert "Perplexity over rounds" in render_comparison(both)


def test_a_run_told_by_its_loss_has_two_plots_of_it(records):
    start, *others = records
    told = [{**start, "config": {**start["config"], "evaluation.metric": "loss"}}, *others]
    names = [plot.name for plot in round_plots(history(told))]
    assert {"held-out-loss", "loss"} <= set(names)
    assert len(names) == len(set(names))
