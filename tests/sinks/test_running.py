"""A sink can neither end a run nor slow it."""

from __future__ import annotations

import errno
import json
import threading
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedpeft.config.observation import SINKS
from fedpeft.sinks import KINDS, About, Kind, Sink, Sinks, opened, running
from tests.sinks.records import journal_of, round_record

Told = Callable[[], list[str]]
Observe = Callable[..., Sinks]


class Heard:
    """A kind of sink that notes what it is told, and fails where `fail(round)` raises."""

    def __init__(self, held: int = 0, fail: Callable[[int], None] = lambda round_: None) -> None:
        self.rounds: list[int] = []
        self.ends: list[str] = []
        self.abouts: list[About] = []
        self._held, self._fail = held, fail

    def kind(self) -> dict[str, Kind]:
        return {"tensorboard": Kind("json", "extra", self._open), "mlflow": Kind("json", "extra", self._open)}

    def _open(self, settings: Any, about: About) -> Sink:
        self.abouts.append(about)

        def settled(record: Any) -> None:
            self._fail(record["round"])
            self.rounds.append(record["round"])

        return Sink(self._held, settled, self.ends.append)


def full(round_: int) -> None:
    if round_ == 2:
        raise OSError(errno.ENOSPC, "No space left on device")


def carried_out(sinks: Sinks, done: int, last: int, how: str = "completed") -> None:
    sinks.begin(journal_of(done), done)
    for number in range(done + 1, last + 1):
        sinks.round(round_record(number))
    sinks.end(how)
    sinks.wait()


def test_a_sink_hears_of_each_round_once_and_of_the_end(observe: Observe, warnings_told: Told) -> None:
    heard = Heard()
    carried_out(observe("tensorboard", kinds=heard.kind()), 0, 3)
    assert (heard.rounds, heard.ends, warnings_told()) == ([1, 2, 3], ["completed"], [])


@pytest.mark.parametrize(("held", "expected"), [(0, [1, 2, 3, 4]), (1, [2, 3, 4]), (2, [3, 4]), (3, [4])])
def test_a_sink_gets_what_it_lacks_and_nothing_twice(observe: Observe, held: int, expected: list[int]) -> None:
    heard = Heard(held)
    carried_out(observe("tensorboard", kinds=heard.kind()), 2, 4)
    assert heard.rounds == expected


def test_the_next_process_knows_what_a_sink_has(observe: Observe) -> None:
    first, second, moved = Heard(), Heard(), Heard()
    carried_out(observe("tensorboard", kinds=first.kind()), 0, 3, "failed")
    carried_out(observe("tensorboard", kinds=second.kind()), 3, 4)
    carried_out(observe("tensorboard", kinds=moved.kind(), tensorboard={"folder": "elsewhere"}), 4, 4)
    assert [heard.abouts[0].held for heard in (first, second, moved)] == [0, 3, 0]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"round": "x", "settings": ""}', "null"])
def test_a_damaged_note_of_what_a_sink_has_counts_as_none(observe: Observe, tmp_path: Path, text: str) -> None:
    (tmp_path / "sinks").mkdir()
    (tmp_path / "sinks" / "tensorboard.json").write_text(text)
    heard = Heard()
    carried_out(observe("tensorboard", kinds=heard.kind()), 2, 2)
    assert heard.rounds == [1, 2]


def test_a_sink_that_fails_is_told_once_and_the_others_go_on(observe: Observe, warnings_told: Told) -> None:
    bad, good = Heard(fail=full), Heard()
    kinds = {**bad.kind(), "mlflow": good.kind()["mlflow"]}
    carried_out(observe("tensorboard", "mlflow", kinds=kinds), 0, 4)
    assert (bad.rounds, bad.ends) == ([1], [])
    assert (good.rounds, good.ends) == ([1, 2, 3, 4], ["completed"])
    assert warnings_told() == [
        "the sink tensorboard is switched off and the run goes on without it: no space left on device"
    ]


@pytest.mark.parametrize("error", [SystemExit(1), ValueError("row: a patient's words")])
def test_whatever_a_library_raises_stays_in_its_sink(
    observe: Observe, warnings_told: Told, error: BaseException
) -> None:
    def fail(round_: int) -> None:
        raise error

    carried_out(observe("tensorboard", kinds=Heard(fail=fail).kind()), 0, 1)
    (line,) = warnings_told()
    assert line.endswith(type(error).__name__)
    assert "patient" not in line


def test_a_sink_that_hangs_slows_nothing(
    observe: Observe, warnings_told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running, "MOST_WAITING", 3)
    stuck = threading.Event()
    started = time.monotonic()
    sinks = observe("tensorboard", kinds=Heard(fail=lambda round_: stuck.wait(60) and None).kind())
    sinks.begin(journal_of(0), 0)
    for number in range(1, 20):
        sinks.round(round_record(number))
    sinks.end("completed")
    sinks.wait(0.2)
    stuck.set()
    assert time.monotonic() - started < 5
    assert warnings_told() == [
        "the sink tensorboard is switched off and the run goes on without it: it is 3 rounds behind"
    ]


def test_a_sink_that_never_ends_is_left(observe: Observe, warnings_told: Told) -> None:
    stuck = threading.Event()
    sinks = observe("tensorboard", kinds=Heard(fail=lambda round_: stuck.wait(60) and None).kind())
    sinks.begin(journal_of(1), 1)
    sinks.end("completed")
    sinks.wait(0.1)
    stuck.set()
    (line,) = warnings_told()
    assert "did not end" in line


@pytest.mark.parametrize("name", sorted(SINKS))
def test_a_missing_library_is_told_before_the_first_round(observe: Observe, warnings_told: Told, name: str) -> None:
    kinds = {name: KINDS[name]._replace(library="no_such_library")}
    sinks = observe(name, kinds=kinds)
    sinks.begin(journal_of(0), 0)
    (line,) = warnings_told()
    assert f"pip install 'fedpeft[{KINDS[name].extra}]'" in line
    assert "goes on without it" in line
    sinks.round(round_record(1))
    sinks.end("completed")
    sinks.wait()
    assert len(warnings_told()) == 1


def test_every_sink_that_settings_may_name_is_there() -> None:
    assert set(KINDS) == set(SINKS)


def test_an_extra_brings_every_library() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    for kind in KINDS.values():
        wanted = kind.library.replace("_", "-")
        assert any(need.startswith(wanted) for need in project["optional-dependencies"][kind.extra])


def test_a_run_that_ends_by_an_error_is_a_failed_one(tmp_path: Path, observe: Observe) -> None:
    heard = Heard()

    def fail() -> None:
        with opened(observe("mlflow").settings, tmp_path, "demo", "run", heard.kind()) as sinks:
            sinks.begin(journal_of(0), 0)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert heard.ends == ["failed"]


def test_the_note_of_what_a_sink_has_is_its_last_round(observe: Observe, tmp_path: Path) -> None:
    carried_out(observe("tensorboard", kinds=Heard().kind()), 0, 3)
    assert json.loads((tmp_path / "sinks" / "tensorboard.json").read_text())["round"] == 3
