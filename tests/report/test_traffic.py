"""What a run sent against what others would have, on journals whose sums can be done by hand."""

from __future__ import annotations

from typing import Any

import pytest

from fedpeft.links import Link, Transfer
from fedpeft.report.history import history
from fedpeft.report.page import render_page
from fedpeft.report.traffic import (
    DENSE,
    FULL,
    OURS,
    links_of,
    rounds_table,
    sent_by,
    summary,
    taken,
    total,
    traffic_table,
    traffic_words,
)

LINE = Link(8e6, 8e6, 0.5, 1e-6, 2e-6)


def client(partition: int, down: int, up: int) -> dict[str, Any]:
    return {"partition": partition, "bytes_down": down, "bytes_up": up}


def records(**adapter: Any) -> list[dict[str, Any]]:
    """Three sites are asked in round 1, of whom two answer; two in round 2, in two exchanges."""
    start = {
        "event": "start",
        "config": {"name": "small", "observation.links": '["mine = 8 8 500 1 2"]'},
        "adapter": {"bytes": 1_000, "dense_bytes": 2_000, "base_bytes": 1_000_000, **adapter},
    }
    first = {"cohort": [0, 1, 2], "clients": [client(0, 1_000, 400), client(1, 1_000, 600)], "exchanges": 1}
    second = {"cohort": [0, 1], "clients": [client(0, 500, 500), client(1, 700, 100)], "exchanges": 2}
    return [
        start,
        {"event": "round", "round": 1, **first, "bytes_down": 3_000, "bytes_up": 1_000},
        {"event": "round", "round": 2, **second, "bytes_down": 1_200, "bytes_up": 600},
    ]


def test_others_send_to_all_who_are_asked_and_hear_from_all_who_answer() -> None:
    compared = {name: total(rounds) for name, rounds in sent_by(history(records())).items()}
    assert compared == {
        OURS: Transfer(4_200, 1_600),
        DENSE: Transfer(5 * 2_000, 4 * 2_000),
        FULL: Transfer(5e6, 4e6),
    }


def test_rounds_follow_one_another_and_each_waits_for_its_slowest_site() -> None:
    # At a byte a microsecond: 1600 of site 1 and one trip, then 1000 of site 0 and two; energy is 4200 + 2 * 1600 µJ.
    found = taken(LINE, sent_by(history(records()))[OURS])
    assert found.seconds == pytest.approx(1_600e-6 + 0.5 + 1_000e-6 + 1.0)
    assert found.joules == pytest.approx(7_400e-6)


def test_the_links_of_the_settings_are_told_beside_those_that_are_known() -> None:
    links = links_of(history(records()))
    assert list(links) == ["LTE", "home", "data centre", "mine"]
    assert links["mine"] == pytest.approx(LINE)


def test_the_summary_holds_bytes_and_costs_of_all_three() -> None:
    found = summary(history(records()))
    assert found["bytes"]["run"] == {"down": 4_200, "up": 1_600}
    assert found["bytes"]["full"] == {"down": 5_000_000, "up": 4_000_000}
    assert found["links"]["mine"]["run"] == pytest.approx({"seconds": 1.5026, "joules": 0.0074})
    assert found["links"]["mine"]["dense"]["seconds"] == pytest.approx(2 * (0.004 + 0.5))


def test_the_table_says_how_many_times_more_the_others_send() -> None:
    table = traffic_table(history(records()))
    assert [row[:4] for row in table.rows] == [
        (OURS, "4.20 kB", "1.60 kB", "1.00 ×"),
        (DENSE, "10.0 kB", "8.00 kB", "3.10 ×"),
        (FULL, "5.00 MB", "4.00 MB", "1,552 ×"),
    ]
    assert table.rows[0][-1] == "1.50 s, 7.40 mJ"


def test_bytes_are_summed_round_by_round() -> None:
    table = rounds_table(history(records()))
    assert table.rows[1][:7] == ("2", "1.20 kB", "600 B", "4.20 kB", "1.60 kB", "18.0 kB", "9.00 MB")
    assert table.rows[1][-1] == "1.00 s, 2.40 mJ"


def test_words_say_what_was_sent_and_that_times_are_modelled() -> None:
    sent, modelled = traffic_words(history(records()))
    assert sent == f"Sent 4.20 kB down and 1.60 kB up: 3.10 × less than {DENSE}, 1,552 × less than {FULL}."
    assert "not measured" in modelled
    assert "mine 1.50 s and 7.40 mJ" in modelled
    assert traffic_words(history(records()[:1])) == ()


@pytest.mark.parametrize(
    ("size", "words"),
    [(644, "as much as"), (322, "2.00 × more than"), (6_440, "9.99 × less than")],
)
def test_words_say_less_more_or_as_much(size: int, words: str) -> None:
    """The run sent 5,800 bytes; the adapter would have gone down five times and up four times."""
    assert f": {words} {DENSE}, " in traffic_words(history(records(dense_bytes=size)))[0]


def test_silent_answers_are_counted() -> None:
    told = records()
    told[2]["clients"][1]["silent"] = 1.0
    assert traffic_words(history(told))[2].startswith("Of 4 answers 1 said nothing")


def test_the_page_has_what_was_sent_once_there_is_a_round() -> None:
    assert "What was sent" in render_page(records())
    assert "of 4 answers" not in render_page(records()).lower()
    assert "What was sent" not in render_page(records()[:1])


def test_a_journal_that_knows_no_sizes_is_compared_with_nothing() -> None:
    run = history(records(bytes=None, dense_bytes=None, base_bytes=None))
    assert list(sent_by(run)) == [OURS]
    assert traffic_words(run)[0] == "Sent 4.20 kB down and 1.60 kB up."


def test_what_went_for_scores_at_the_sites_is_told_apart() -> None:
    told = records()
    told[1] |= {"evaluation_bytes": {"down": 1_500, "up": 20}}
    told[2] |= {"evaluation_bytes": {"down": 500, "up": 30}}
    assert traffic_words(history(told))[2] == "To score the adapter at the sites went 2.00 kB down and 50 B up beside."
    assert traffic_words(history(told))[:2] == traffic_words(history(records()))
