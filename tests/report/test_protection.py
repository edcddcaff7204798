"""What the page says was protected, from whom, and what was not, for each way to protect."""

from __future__ import annotations

from typing import Any

import pytest

from fedpeft.report.findings import finding_table
from fedpeft.report.history import History, history
from fedpeft.report.protection import protected_by, protection_words

SUMS = {"federation.channel.kind": "secure", "federation.channel.secure.least_cohort": 5}
PROMISED = {"clip_norm": 0.5, "noise_multiplier": 0.8, "delta": 0.01}


def told(mechanism: str, more: dict[str, Any] | None = None, *records: dict[str, Any]) -> History:
    promise = {f"privacy.{mechanism}.{key}": value for key, value in PROMISED.items()} if mechanism != "none" else {}
    config = {"privacy.mechanism": mechanism, **promise, **(more or {})}
    round_ = {"event": "round", "round": 1, **({"epsilon": 3.5} if promise else {})}
    return history([{"event": "start", "config": config}, round_, *records])


CENTRAL, OWN_ROWS = {"privacy.central.sampler": "fixed"}, {"privacy.example.rows": 40}


@pytest.mark.parametrize(
    ("mechanism", "more", "words"),
    [
        ("none", {}, ["Nothing else was protected: the server saw every update"]),
        ("central", CENTRAL, ["unit is a client", "Not from the server", "a fixed number of clients was drawn"]),
        ("local", {}, ["unit is a client", "the server too", "no draw is counted"]),
        ("example", OWN_ROWS, ["unit is an example", "the server too", "each example was drawn by a coin", "40 rows"]),
        ("none", SUMS, ["No ε is promised", "sums of the updates of 5 clients or more and no update alone"]),
        ("central", SUMS, ["unit is a client", "Clients added the noise", "no draw is counted", "5 clients or more"]),
        ("example", {**SUMS, **OWN_ROWS}, ["unit is an example", "5 clients or more and no update alone"]),
        (
            "none",
            {**SUMS, "aggregation.merge.rule": "flexlora"},
            ["no update alone", "two sums in a round, over the same clients", "no second sum without all clients"],
        ),
        ("local", SUMS, ["unit is a client", "5 clients or more and no update alone"]),
    ],
)
def test_the_page_says_unit_adversary_sampler_and_what_travels_in_clear(
    mechanism: str, more: dict[str, Any], words: list[str]
) -> None:
    said = " ".join(protection_words(told(mechanism, more)))
    for text in words:
        assert text in said, text
    assert ("ε = 3.5 at δ = 0.01" in said) == (mechanism != "none")
    for text in ("its loss and other figures", "how many examples", "who took part", "how long each took"):
        assert text in said, text
    if more.get("federation.channel.kind"):
        assert "saw every update" not in said
        assert "saw each update" not in said
        assert "were not signed: a server that does not keep to the protocol could" in said


def test_signed_sums_say_against_which_server_they_hold() -> None:
    signed = {"federation.channel.secure.signed": True, "federation.channel.secure.colluding": 0.1}
    said = " ".join(protection_words(told("none", {**SUMS, **signed})))
    assert "even of a server that does not keep to the protocol, with up to 10% of the clients on its side" in said
    assert "not signed" not in said


def test_what_attacks_found_stands_with_its_interval_and_what_protected() -> None:
    one = {"event": "finding", "attack": "membership", "adversary": "every adapter", "metric": "advantage", "n": 1200}
    found = [{**one, "value": 0.25, "low": 0.2, "high": 0.3}, {**one, "value": None, "low": None, "high": None}]
    rows = finding_table(told("central", CENTRAL, *found)).rows
    assert rows[0] == (
        "membership",
        "every adapter",
        "advantage",
        "0.25",
        "0.2 to 0.3",
        "1,200",
        "central noise of 0.8",
    )
    assert rows[1][3] == rows[1][4] == "–"
    assert finding_table(told("none")).rows == ()


def test_what_protects_is_named_in_a_few_words() -> None:
    assert protected_by(told("none").config) == "nothing"
    assert protected_by(told("none", SUMS).config) == "secure sums"
    assert protected_by(told("example", {**SUMS, **OWN_ROWS}).config) == "example noise of 0.8 and secure sums"
