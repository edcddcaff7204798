"""Tables: numbers that can be checked by hand, and text that comes out as it went in."""

from __future__ import annotations

import html
import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.errors import FedPeftError
from fedpeft.report.tables import (
    Table,
    comparison_table,
    difference_table,
    failure_table,
    render_html,
    render_markdown,
    render_plain,
    settings_table,
    summary_rows,
    summary_table,
)
from fedpeft.report.units import between, human_bytes, human_count, human_seconds, percent, points, relative, times

TEXTS = st.text(max_size=20)
TABLES = st.integers(1, 4).flatmap(
    lambda width: st.builds(
        Table, st.tuples(*[TEXTS] * width), st.lists(st.tuples(*[TEXTS] * width), max_size=4).map(tuple)
    )
)


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (human_bytes(1_840_000), "1.84 MB"),
        (human_bytes(999), "999 B"),
        (human_bytes(999_999), "1.00 MB"),
        (human_bytes(90_852_864), "90.9 MB"),
        (human_bytes(123_456_789_012), "123 GB"),
        (human_bytes(None), "–"),
        (human_count(148_227), "148,227"),
        (human_count(22_713_216), "22.7 M"),
        (human_seconds(8.314), "8.31 s"),
        (human_seconds(59.6), "1 min 00 s"),
        (human_seconds(187), "3 min 07 s"),
        (human_seconds(7500), "2 h 05 min"),
        (percent(0.7125), "71.2 %"),
        (percent(0.587, 0.041), "58.7 ± 4.1 %"),
        (percent(None), "–"),
        (points(0.0523), "5.2 points above"),
        (points(-0.0281), "2.8 points below"),
        (points(-0.0004), "level with"),
        (relative(0.281), "28.1 %"),
        (relative(0.00042), "0.042 %"),
        (relative(1e-5), "0.001 %"),
        (relative(9e-6), "< 0.001 %"),
        (relative(0.0), "0.0 %"),
        (relative(math.nan), "–"),
        (relative(None), "–"),
        (between([8, 2, 4]), "2 to 8"),
        (between([4.0, 4.0]), "4"),
        (between({2, 16}, "–"), "2–16"),
        (times(312.4), "312 ×"),
        (times(None), "–"),
    ],
)
def test_numbers_read_as_people_write_them(said, expected):
    assert said == expected


def test_the_table_a_run_ends_with(records):
    table = summary_table(records)
    assert table.columns == (
        "", "accuracy", "films", "microblog", "newspaper", "shops",
        "bytes up", "bytes down", "× less than full model", "time",
    )  # fmt: skip
    # 58 of 60 requests were answered: 58 × 593,400 up, 60 × 593,700 down, against 2 × 60 × 90,852,864.
    nothing = ("–", "–", "–")
    assert table.rows == (
        ("federation", "71.2 %", "77.2 %", "71.2 %", "62.3 %", "74.2 %", "34.4 MB", "35.6 MB", "156 ×", "1 min 42 s"),
        ("frozen model, trained head", "60.2 %", "66.2 %", "60.2 %", "51.2 %", "63.2 %", "–", "–", "–", "1 min 01 s"),
        ("sites alone (mean of 12)", "58.7 ± 4.1 %", "64.7 %", "58.7 %", "49.7 %", "61.7 %", *nothing, "1 min 01 s"),
        ("pooled data", "74.1 %", "80.1 %", "74.1 %", "65.1 %", "77.1 %", "–", "–", "–", "1 min 01 s"),
    )  # fmt: skip


def test_a_run_that_is_going_is_told_from_its_rounds(tell):
    (row,) = summary_rows(tell(rounds=4, ended=False, bounds=False, failures=False))
    assert row.name == "federation, so far (round 4 of 4)"
    assert row.score == pytest.approx(0.73 - 0.28 / 5 + 0.008)
    assert (row.bytes_up, row.bytes_down) == (24 * 593_400, 24 * 593_700)
    assert row.ratio == pytest.approx(2 * 90_852_864 / (593_400 + 593_700))
    assert row.seconds == pytest.approx(4 * 9.4)


def test_a_round_told_twice_counts_once(tell):
    once = tell(rounds=3, ended=False, bounds=False)
    assert summary_rows([*once, once[2]]) == summary_rows(once)


def test_every_shape_of_journal_has_a_table(any_records):
    table = summary_table(any_records)
    assert table.rows
    assert all(len(row) == len(table.columns) for row in table.rows)
    assert "nan" not in render_plain(table).lower()


@pytest.mark.parametrize(
    ("rule", "ranks", "name"),
    [
        ("flora", {2, 8}, "federation (flora, ranks 2–8)"),
        ("flora", {8}, "federation (flora)"),
        (None, {2, 8}, "federation (ranks 2–8)"),
        (None, {0}, "federation"),
    ],
)
def test_the_result_names_the_rule_and_ranks_that_differ(rule, ranks, name, tell):
    start, *others = tell(rounds=2, bounds=False, merges=True)
    start["config"]["aggregation.merge.rule"] = rule
    for record in others:
        for client in record.get("clients", ()):
            client["rank"] = sorted(ranks)[client["partition"] % len(ranks)]
    assert summary_rows([start, *others])[0].name == name


def test_the_table_in_a_terminal_is_no_wider_for_a_rule_of_a_long_name(tell):
    start, *others = tell(merges=True)
    start["config"]["aggregation.merge.rule"] = "geometric_median"
    lines = render_plain(summary_table([start, *others])).split("\n")
    assert max(map(len, lines)) == 120
    assert lines[4].split()[:2] == ["federation", "71.2"]
    assert lines[5:7] == ["  (geometric_median, ranks", "  2–8)"]
    assert lines[7].startswith("frozen model, trained head  ")


def test_failures_name_round_site_and_reason(records):
    assert failure_table(records).rows == (("3", "2", "no answer within 600 s"), ("6", "3", "no answer within 600 s"))


def test_settings_are_told_in_the_order_of_the_config(records):
    assert settings_table(records).rows[:2] == (("name", "demo"), ("seed", "7"))


def test_runs_side_by_side_show_only_the_settings_that_differ(tell):
    runs = {"short": tell(rounds=2, bounds=False), "long": tell(rounds=5, bounds=False, grouped=False)}
    table = comparison_table(runs)
    assert [row[:4] for row in table.rows] == [("short", "lora", "2", "71.2 %"), ("long", "lora", "5", "71.2 %")]
    assert table.rows[1][4:8] == ("–",) * 4
    assert difference_table(runs) == Table(("", "rounds"), (("short", "2"), ("long", "5")))


@pytest.mark.parametrize("records", [[], [{"event": "end"}]])
def test_a_journal_without_its_start_line_is_one_sentence(records):
    with pytest.raises(FedPeftError, match=r'^journal\.jsonl, line 1: expected the "start" line'):
        summary_table(records)


def test_plain_text_is_aligned_and_breaks_long_headings():
    table = Table(("", "× less than full model"), (("a", "5 ×"), ("longer", "312 ×")))
    assert render_plain(table).split("\n") == [
        "           × less",
        "        than full",
        "            model",
        "─────────────────",
        "a             5 ×",
        "longer      312 ×",
    ]


def test_markdown_escapes_what_would_break_a_row():
    table = Table(("", "x"), (("a|b", "<i>\n2"),))
    assert render_markdown(table) == "|  | x |\n| --- | ---: |\n| a\\|b | &lt;i&gt; 2 |"


@given(table=TABLES)
def test_a_rendered_table_keeps_its_rows_whatever_they_say(table):
    assert len(render_markdown(table).split("\n")) == len(table.rows) + 2
    assert len(render_plain(table).split("\n")) >= len(table.rows) + 2
    page = render_html(table)
    cells = re.findall(r"<t[hd](?: [^>]*)?>(.*?)</t[hd]>", page, flags=re.DOTALL)
    assert [html.unescape(cell) for cell in cells] == [
        html.unescape(html.escape(text)) for row in (table.columns, *table.rows) for text in row
    ]
