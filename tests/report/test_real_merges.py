"""The page of real runs: four rules at unlike ranks, told by their own journals."""

from __future__ import annotations

import pytest

from fedpeft import journal
from fedpeft.federate import federate
from fedpeft.report.exactness import merge_words, module_table
from fedpeft.report.history import history
from fedpeft.report.merge_plots import merge_error_plot, merge_plots
from fedpeft.report.tables import summary_rows
from fedpeft.runs import folder_for
from tests import tiny

EXACT = "Every error is below 0.001 %: the rule is exact, rounding aside."


@pytest.fixture(scope="module")
def run(tiny_model, tiny_rows, tmp_path_factory):
    """`run(rule)` is the journal of two rounds of three sites at ranks 1, 2 and 3."""

    def told(rule):
        config = tiny.run_config(
            tiny_model,
            tiny_rows,
            tmp_path_factory.mktemp(rule) / "run",
            rounds=2,
            seed=12,
            federation={"clients": 3, "cohort": 3, "ranks": {"rule": "listed", "listed": {"ranks": [1, 2, 3]}}},
            aggregation={"merge": {"rule": rule}},
            training={"learning_rate": 0.1},
        )
        folder = folder_for(config)
        federate(config, folder, tiny.transport(config, folder), engine="local")
        assert "How exact the merges were" in (folder.root / "report.html").read_text()
        return journal.read(folder.journal)

    return told


@pytest.mark.parametrize(
    ("rule", "exact", "drifts"),
    [("fedavg", False, False), ("flexlora", False, False), ("flora", True, True), ("fedex", True, True)],
)
def test_a_rule_is_told_by_what_it_did(rule, exact, drifts, run, one_thread):
    records = run(rule)
    told = history(records)
    words = merge_words(told)
    assert f"The rule {rule} merged what the sites sent, and sgd moved the adapter" in words
    assert (EXACT in words) is exact
    assert ("The base has taken up a residual of rank" in words) is drifts
    assert told.ranks == {0: (1, 1), 1: (2, 2), 2: (3, 3)}
    assert told.server_rank == 3
    assert summary_rows(records)[0].name.startswith(f"federation ({rule}, ranks 1–3)")
    assert len(merge_plots(told)) == (3 if drifts else 2)
    assert len(module_table(told).rows) == 4


def test_what_flexlora_errs_by_is_the_tail(run, one_thread):
    *_, error, tail = merge_error_plot(history(run("flexlora"))).figure.axes[0].lines
    assert list(error.get_ydata()) == pytest.approx(list(tail.get_ydata()), rel=1e-6)
    assert min(error.get_ydata()) > 1e-3
