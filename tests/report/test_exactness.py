"""What is said of the merges: true for exact rules and inexact ones, and silent on what nobody measured."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.report.exactness import merge_words, module_table, modules_title
from fedpeft.report.history import history
from fedpeft.report.page import render_page

FIGURES = ("merge_error", "merge_errors", "effective_ranks", "tail", "tails", "residual_rank", "residual_dropped")


def run(tell, *figures, **config):
    """A run of six sites a round whose rounds say `figures` of their merges, one a round."""
    start, *rounds = tell(rounds=len(figures), bounds=False, ended=False, failures=False)
    start["config"].update(config)
    return history([start, *({**record, **more} for record, more in zip(rounds, figures, strict=True))])


def test_nothing_is_said_of_merges_that_were_not_measured(records):
    assert merge_words(history(records)) == ""
    assert module_table(history(records)).rows == ()


def test_an_inexact_rule_is_told_by_its_last_error_and_its_greatest(tell):
    words = merge_words(
        run(
            tell,
            {"merge_error": 0.1, "tail": 0.2},
            {"merge_error": 0.4, "tail": 0.1},
            {"merge_error": 0.281, "tail": 0.05},
            **{"aggregation.merge.rule": "fedavg", "aggregation.optimizer.kind": "adam", "adapter.lora.rank": 8},
        )
    )
    assert words == (
        "The rule fedavg merged what the sites sent, and adam moved the adapter by what came out; the error is how far "
        "the merged adapter lies from the exact mean of what the sites' adapters do, over that mean's norm. In round 3 "
        "the error was 28.1 %; the greatest was 40.0 %, in round 2. A tail of 5.0 % of the last mean's norm fits into "
        "no adapter of rank 8."
    )


@pytest.mark.parametrize(("tail", "told"), [(5e-17, False), (9e-6, False), (1.1e-5, True), (None, False)])
def test_a_tail_that_is_rounding_is_not_told(tail, told, tell):
    words = merge_words(run(tell, {"merge_error": 0.1, "tail": tail}))
    assert ("A tail of 0.001 % of the last mean's norm" in words) is told
    assert ("tail" in words) is told


def test_a_mean_that_was_seen_through_a_sketch_says_how_much_of_it_was_not(tell):
    said = merge_words(run(tell, *({"merge_error": 0.1, "merge_lacks": share} for share in (0.02, 0.05, None))))
    assert "what lay outside it, 5.0 % of a mean at most as far as a few columns tell, counts as missed." in said
    assert "In 1 of 3 rounds a site fell silent between the two, and products stayed." in said
    assert "sketch" not in merge_words(run(tell, {"merge_error": 0.1}))


def test_a_last_error_that_is_the_greatest_is_told_once(tell):
    words = merge_words(run(tell, {"merge_error": 0.1}, {"merge_error": 0.2}))
    assert words.endswith("In round 2 the error was 20.0 %.")


@pytest.mark.parametrize(
    ("error", "of_module", "exact"),
    [(3e-16, 9e-6, True), (2e-8, None, True), (9e-6, 1.1e-5, False), (1e-5, 0.0, False), (0.0, 0.0, True)],
)
def test_a_rule_is_exact_where_every_error_of_every_module_is_rounding(error, of_module, exact, tell):
    first = {"merge_error": error, "merge_errors": {"q": of_module, "v": 0.0}}
    words = merge_words(run(tell, first, {"merge_error": 0.0, "merge_errors": {"q": 0.0}}))
    assert ("the rule is exact" in words) is exact
    assert ("Every error is below 0.001 %" in words) is exact


def test_a_rule_is_not_exact_whose_budget_left_something_out(tell):
    figures = {"merge_error": 1e-16, "residual_rank": 5.0, "residual_dropped": 0.25}
    budget = {"aggregation.merge.rule": "flora", "aggregation.merge.flora.budget": 5}
    words = merge_words(run(tell, figures, figures, **budget))
    assert "the rule is exact" not in words
    assert "Every error is below 0.001 %, before the residual was cut to its budget." in words
    assert "residual of rank 5" in words
    assert words.endswith("its budget of rank 5 left out parts whose norms add up to 0.5.")


@pytest.mark.parametrize(("budget", "dropped"), [(0, 1e-3), (16, 1e-9)])
def test_rounding_in_the_residual_does_not_make_a_rule_inexact(budget, dropped, tell):
    figures = {"merge_error": 1e-16, "residual_rank": 16.0, "residual_dropped": dropped}
    config = {"aggregation.merge.rule": "flora", "aggregation.merge.flora.budget": budget}
    words = merge_words(run(tell, figures, **config))
    assert "the rule is exact" in words
    assert words.endswith("a residual of rank 16, which an exported adapter holds on top of its own rank.")


@pytest.mark.parametrize(
    ("used", "said"), [((4, 4), "The rule used 4 of 6 updates a round."), ((3, 5), "The rule used 3 to 5 of 6 updates")]
)
def test_a_rule_that_judges_tells_how_many_updates_it_used(used, said, tell):
    measured = [{"merge_error": 0.1, "updates_used": float(number)} for number in used]
    words = merge_words(run(tell, *measured, **{"aggregation.merge.rule": "krum"}))
    assert said in words
    assert "the exact mean of the updates that it used" in words


def test_a_rule_whose_merges_have_no_error_speaks_of_none(tell):
    words = merge_words(run(tell, {"updates_used": 1.0}, **{"aggregation.merge.rule": "krum"}))
    assert words == "The rule krum merged what the sites sent. The rule used 1 of 6 updates a round."


def test_modules_are_told_of_the_last_round_greatest_error_first(tell):
    measured = history(tell(merges=True, rounds=2))
    table = module_table(measured)
    assert table.columns == ("module", "error", "effective rank", "tail")
    assert table.rows == (
        ("layer.0.value", "15.0 %", "3.5", "11.0 %"),
        ("layer.0.query", "5.0 %", "1.5", "2.0 %"),
        ("layer.1.query", "–", "–", "–"),
    )
    assert modules_title(measured, table) == "Modules in round 2 (3)"


def test_modules_of_an_exact_rule_stand_in_order_of_name(tell):
    errors = {"b": 4e-16, "a": 1e-16, "c": 0.0, "d": None, "e": 0.2}
    assert [row[0] for row in module_table(run(tell, {"merge_errors": errors})).rows] == ["e", "a", "b", "c", "d"]


def test_of_many_modules_those_of_greatest_error_are_shown_and_folded(tell):
    start, record = tell(rounds=1, bounds=False, ended=False, evaluated=False)
    errors = {f"layer.{number}": number / 1000 for number in range(1, 1201)}
    measured = {**record, "merge_error": 0.5, "merge_errors": errors}
    table = module_table(history([start, measured]))
    assert len(table.rows) == 100
    assert (table.rows[0][0], table.rows[-1][0]) == ("layer.1200", "layer.1101")
    page = render_page([start, measured])
    assert "<details><summary>Modules in round 1 (100 of 1,200, greatest error first)</summary>" in page
    few = {**measured, "merge_errors": dict(list(errors.items())[:20])}
    assert "<details open><summary>Modules in round 1 (20)</summary>" in render_page([start, few])


@given(data=st.data())
def test_whatever_is_absent_or_null_the_rest_is_told(data, tell):
    start, *rounds = tell(merges=True, rounds=3, bounds=False, ended=False)
    for record in rounds:
        for key in (*FIGURES, "clients"):
            fate = data.draw(st.sampled_from(("kept", "null", "absent")), key)
            if fate == "null":
                record[key] = None
            elif fate == "absent":
                del record[key]
    for key in ("aggregation.merge.rule", "aggregation.optimizer.kind", "adapter.lora.rank", "adapter.family"):
        if data.draw(st.booleans(), key):
            del start["config"][key]
    measured = history([start, *rounds])
    words, rows = merge_words(measured), module_table(measured).rows
    told = " ".join([words, *(cell for row in rows for cell in row)])
    assert "None" not in told
    assert "nan" not in told
    known = {key: [record[key] for record in rounds if record.get(key) is not None] for key in FIGURES}
    assert (" the error was " in words) == bool(known["merge_error"])
    assert ("A tail of" in words) == bool(known["tail"])
    assert ("residual of rank" in words) == bool(known["residual_rank"])
    assert bool(rows) == any(known[key] for key in ("merge_errors", "effective_ranks", "tails"))
