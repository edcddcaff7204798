"""What may stand in a log, whatever nodes and libraries say."""

from __future__ import annotations

import io
import json
import logging
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import pytest

from fedpeft import events
from fedpeft.errors import ConfigError, DataError, FederationError, FedPeftError, PacketError, QuorumError, sentence
from fedpeft.logs import (
    FAILURE_KINDS,
    FORMAT_VARIABLE,
    MOST_CHARACTERS,
    emit,
    failure_kind,
    logging_to,
    one_line,
    speak_through,
    told,
)
from tests.sinks.records import START, round_record

HOSTILE = [
    "the patient Ada Lovelace has a fever",
    "/srv/hospital/patients.csv: expected a column, found 'Ada Lovelace'; correct it.",
    "x\nERROR forged: the run failed",
    '", "event": "run_ended", "x": "',
    "\x1b[31mred\x1b]0;title\x07",
    "‮desrever",
    "-----BEGIN PRIVATE KEY----- MIGHAgEA",
    "a" * 1_000_000,
    ") ; the patient Ada Lovelace; partition 9: no answer within the deadline (partition 1: x",
    "round 1: expected a, found b (partition 4: Ada Lovelace",
    "update of partition 3, Ada Lovelace: expected A, found B; C.",
    "%s %d %(x)s {0}",
    "\ud800",
]
SECRETS = ("Ada", "Lovelace", "/srv", "forged", "PRIVATE", "\x1b", "‮", "aaaa", "desrever")


@pytest.fixture
def written() -> Iterator[io.StringIO]:
    """What the log holds, a line of JSON an event."""
    text = io.StringIO()
    with logging_to(text, "json"):
        yield text


def lines(text: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.getvalue().splitlines()]


@pytest.mark.parametrize("words", HOSTILE)
def test_nothing_that_a_node_says_in_its_words_reaches_the_log(written: io.StringIO, words: str) -> None:
    failure = {"partition": 3, "reason": words}
    events.round_settled("run-1", round_record(2, failures=[failure]), 4, "accuracy")
    events.run_failed(
        "run-1", QuorumError(sentence("round 3", expected="2", found=f"0 (partition 3: {words})", remedy="x"))
    )
    logging.getLogger("fedpeft.engines").warning("node %d: %s", 7, PacketError(words))
    found = lines(written)
    assert [line["event"] for line in found] == ["node_failed", "round", "run_failed", "log"]
    assert not [secret for secret in SECRETS if secret in written.getvalue()]
    assert all(len(line) < 1500 for line in written.getvalue().splitlines())
    assert found[0]["kind"] in FAILURE_KINDS
    assert (found[0]["node"], found[0]["round"], found[0]["run"]) == (3, 2, "run-1")


@pytest.mark.parametrize("words", HOSTILE)
@pytest.mark.parametrize("form", ["json", "text"])
def test_a_text_cannot_forge_a_line(form: str, words: str) -> None:
    text = io.StringIO()
    with logging_to(text, form):
        logging.getLogger("fedpeft.sinks.x").warning("it says %s", words)
        emit(
            logging.getLogger("fedpeft.sinks.x"),
            "told",
            "it",
            level=logging.WARNING,
            group=words,
            more={words: [words]},
        )
    assert len(text.getvalue().splitlines()) == 2
    assert len(text.getvalue()) < 4000
    assert not {"\x1b", "‮", "\x07"} & set(text.getvalue())


def test_what_was_found_is_left_out_of_a_sentence_that_is_logged(written: io.StringIO) -> None:
    said = sentence("fedpeft", expected="0.1.0", found="Ada Lovelace; /srv", remedy="install the same version")
    logging.getLogger("fedpeft.engines").warning("node %d is left out: %s", 7, said)
    text = lines(written)[0]["text"]
    assert text.startswith("node 7 is left out: fedpeft: expected 0.1.0, found something else")
    assert "Ada" not in text


def test_a_line_holds_time_level_event_run_round_and_node(written: io.StringIO) -> None:
    events.run_started("run-1", START, 0)
    events.round_settled("run-1", round_record(1), 4, "accuracy")
    events.run_ended("run-1", {"rounds": 4, "stopped": "early", "seconds": 8.0, "bytes_up": 1, "bytes_down": 2})
    start, failed, settled, ended = lines(written)
    assert [line["event"] for line in (start, failed, settled, ended)] == [
        "run_started",
        "node_failed",
        "round",
        "run_ended",
    ]
    assert list(start)[:4] == ["time", "level", "event", "run"]
    assert start["time"].endswith("+00:00")
    assert (start["rounds"], start["cohort"], start["adapter"], start["done"]) == (4, 2, "lora", 0)
    assert (failed["level"], failed["node"], failed["kind"]) == ("warning", 3, "no answer in time")
    assert (settled["loss"], settled["updates"], settled["failures"]) == (1.0, 1, 1)
    assert settled["held_out"] == {"accuracy": 0.5}
    assert settled["seconds"]["exchange"] == 1.5
    assert "nodes" not in settled["seconds"]
    assert settled["text"] == "round 1 of 4: loss 1.0000, 1 updates, 1 failures, held-out accuracy 0.5000"
    assert (ended["stopped"], ended["rounds"]) == ("early", 4)


def test_what_is_no_number_is_null(written: io.StringIO) -> None:
    events.round_settled("run-1", round_record(1, loss=float("nan"), failures=[]), 4, "accuracy")
    assert lines(written)[0]["loss"] is None


def test_an_error_that_is_not_ours_is_its_class_and_its_place(written: io.StringIO) -> None:
    try:
        raise ValueError("Ada Lovelace")
    except ValueError:
        logging.getLogger("fedpeft.rounds").exception("a bug")
    (line,) = lines(written)
    assert (line["error"], line["text"]) == ("ValueError", "a bug: ValueError")
    assert line["at"].startswith("test_logs.py:")
    assert "Ada" not in written.getvalue()


def test_the_kinds_of_failures_of_a_quorum_are_told() -> None:
    said = "0 (partition 1: no answer within the deadline; partition 2: CUDA out of memory)"
    error = QuorumError(sentence("round 3", expected="at least 2 usable updates", found=said, remedy="mend the nodes"))
    assert told(error) == (
        "round 3: expected at least 2 usable updates, found 0 "
        "(partition 1: no answer in time; partition 2: out of memory)"
    )


@pytest.mark.parametrize("kind", [ConfigError, FederationError])
def test_what_the_operator_did_is_told_in_full(kind: type[FedPeftError]) -> None:
    said = sentence("rounds", expected="a number", found="'x'", remedy="correct the value")
    assert told(kind(said)) == said


def test_what_quotes_data_or_names_a_path_is_not_in_what_is_shipped(written: io.StringIO) -> None:
    data = DataError(sentence("/srv/patients.csv:3", expected="a label", found="'Ada Lovelace'", remedy="correct it"))
    node = ConfigError(sentence("/etc/fedpeft/node.toml", expected="a rank", found="'x'", remedy="correct it"))
    for error in (data, node):
        logging.getLogger("fedpeft.engines").warning("%s", error)
        assert told(error) == str(error)
    logging.getLogger("fedpeft.engines").info("rows are in %s", "/srv/patients.csv")
    assert [line["text"] for line in lines(written)] == [
        "DataError (its data)",
        "(a path): expected a rank, found 'x'; correct it.",
        "rows are in (a path)",
    ]


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        ("no answer within the deadline", "no answer in time"),
        ("its node is not connected", "not connected"),
        ("out of memory", "out of memory"),
        ("expected the adapter after round 3 in this node's memory, found none", "another reason"),
        ("boom (Flower's error 2)", "stopped with an error"),
        ("update of partition 1: expected finite numbers, found nan", "not finite"),
        ("update of partition 1: expected a norm of at most 2, found 9", "norm too great"),
        ("hello", "another reason"),
    ],
)
def test_a_reason_has_its_kind(words: str, kind: str) -> None:
    assert failure_kind(words) == kind


def test_a_long_text_is_cut() -> None:
    assert len(one_line("x" * 10_000)) == MOST_CHARACTERS
    assert one_line("as it is") == "as it is"


def test_nothing_is_set_up_by_an_import() -> None:
    logger = logging.getLogger("fedpeft")
    assert (logger.handlers, logger.level, logger.propagate) == ([], logging.NOTSET, True)


def test_afterwards_logging_is_as_it_was() -> None:
    with logging_to(sys.stderr, "json"):
        pass
    test_nothing_is_set_up_by_an_import()


def test_a_display_tells_a_round_so_the_text_does_not() -> None:
    text = io.StringIO()
    with logging_to(text, "text", beside_display=True):
        events.round_settled("run-1", round_record(1), 4, "accuracy")
        logging.getLogger("fedpeft.sinks.running").warning("the sink x is switched off")
    assert text.getvalue() == "warning: the sink x is switched off\n"


@pytest.fixture
def flower() -> Iterator[tuple[logging.Logger, io.StringIO]]:
    """A logger that stands for Flower's, with a handler of its own form, and what it has written."""
    ours, text = logging.getLogger("fedpeft"), io.StringIO()
    before = (list(ours.handlers), ours.level, ours.propagate)
    logger = logging.Logger("flwr")
    logger.addHandler(logging.StreamHandler(text))
    logger.handlers[0].setFormatter(logging.Formatter("INFO : %(message)s"))
    yield logger, text
    ours.handlers, ours.propagate = before[0], before[2]
    ours.setLevel(before[1])


def test_in_flowers_log_each_line_has_flowers_form(flower: tuple[logging.Logger, io.StringIO]) -> None:
    logger, text = flower
    speak_through(logger)
    speak_through(logger, "text")
    logging.getLogger("fedpeft.events").info("round %d\nforged", 1)
    try:
        raise ConfigError("rounds: expected a number, found 'x'; correct the value.")
    except ConfigError:
        logger.exception("the app")
    assert text.getvalue().splitlines() == [
        "INFO : round 1 forged",
        "INFO : the app: rounds: expected a number, found 'x'; correct the value.",
    ]


def test_in_json_flowers_own_lines_are_json_too(
    flower: tuple[logging.Logger, io.StringIO], monkeypatch: pytest.MonkeyPatch
) -> None:
    logger, text = flower
    monkeypatch.setenv(FORMAT_VARIABLE, "json")
    speak_through(logger)
    speak_through(logger, "json")
    logger.info("")
    logger.info("Flower says\n%s", "this")
    logging.getLogger("fedpeft.events").info("that")
    assert [line["text"] for line in lines(text)] == ["Flower says this", "that"]


@pytest.mark.filterwarnings("default")
def test_a_warning_of_a_library_is_an_event_too(written: io.StringIO) -> None:
    warnings.warn("it will go away\nsoon", DeprecationWarning, stacklevel=1)
    (line,) = lines(written)
    assert (line["event"], line["level"]) == ("log", "warning")
    assert "it will go away soon" in line["text"]
