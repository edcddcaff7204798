"""`fedpeft watch`: a journal followed while somebody else writes it, and what is shown of it."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fedpeft import journal
from fedpeft.commands.watch import run_watch
from fedpeft.commands.watch_view import picture, plain_lines, sparkline
from fedpeft.errors import RunFolderError
from fedpeft.watching import Follower, Status, status_of
from tests.sinks.records import START, journal_of, round_record

END: dict[str, Any] = {"event": "end", "rounds": 4, "seconds": 8.0, "stopped": "completed"}
FAILED: dict[str, Any] = {"event": "failed", "error": "QuorumError", "reason": "round 3: expected two; mend the nodes."}
HOSTILE = "[bold]x[/] \x1b[31mred\nforged: line ‮"


def written(run: Path, *records: dict[str, Any]) -> Path:
    for record in records:
        journal.append(run / "journal.jsonl", record)
    return run


def followed(path: Path) -> tuple[Follower, Callable[[], list[int]]]:
    follower = Follower(path)
    return follower, lambda: [record["round"] for record in follower.records if record["event"] == "round"]


def shown(status: Status, *, silent: float = 0.0, width: int = 120, height: int = 60) -> str:
    console = Console(file=io.StringIO(), width=width, height=height, force_terminal=True, color_system=None)
    console.print(picture(status, silent, width, height))
    return str(console.file.getvalue())  # type: ignore[attr-defined]


def test_a_follower_reads_only_what_is_new(tmp_path: Path) -> None:
    follower, rounds = followed(tmp_path / "journal.jsonl")
    assert not follower.poll()
    written(tmp_path, *journal_of(2))
    assert follower.poll()
    assert rounds() == [1, 2]
    assert not follower.poll()
    written(tmp_path, round_record(3))
    assert follower.poll()
    assert rounds() == [1, 2, 3]


def test_a_torn_last_line_has_not_happened_yet(tmp_path: Path) -> None:
    path = written(tmp_path, *journal_of(1)) / "journal.jsonl"
    follower, rounds = followed(path)
    line = json.dumps(round_record(2, drift=0.5)).encode() + b"\n"
    for cut in (1, len(line) // 2, len(line) - 1):
        whole = path.read_bytes()
        path.write_bytes(whole + line[:cut])
        follower.poll()
        assert rounds() == [1]
        path.write_bytes(whole)
    path.write_bytes(whole + line)
    assert follower.poll()
    assert rounds() == [1, 2]


def test_a_journal_that_is_cut_by_a_resume_is_read_anew(tmp_path: Path) -> None:
    path = written(tmp_path, *journal_of(4)) / "journal.jsonl"
    follower, rounds = followed(path)
    follower.poll()
    journal.truncate(path, 2)
    assert follower.poll()
    assert rounds() == [1, 2]
    written(tmp_path, {"event": "resume", "round": 2}, round_record(3))
    follower.poll()
    assert rounds() == [1, 2, 3]


def test_a_journal_that_was_rewritten_to_the_same_length_or_more_is_read_anew(tmp_path: Path) -> None:
    path = written(tmp_path, *journal_of(2)) / "journal.jsonl"
    follower, _ = followed(path)
    follower.poll()
    with path.open("r+b") as file:
        text = file.read().replace(b'"loss":0.5', b'"loss":0.6')
        file.seek(0)
        file.write(text)
    written(tmp_path, round_record(3))
    assert follower.poll()
    assert [record.get("loss") for record in follower.records][1:] == [1.0, 0.6, pytest.approx(1 / 3)]


def test_a_journal_that_goes_away_holds_nothing(tmp_path: Path) -> None:
    path = written(tmp_path, *journal_of(1)) / "journal.jsonl"
    follower, _ = followed(path)
    follower.poll()
    path.unlink()
    assert follower.poll()
    assert follower.records == []


@pytest.mark.parametrize("line", ["{", "[]", '{"no": "event"}', "\x00"])
def test_a_line_that_is_no_record_is_told_in_a_sentence(tmp_path: Path, line: str) -> None:
    path = written(tmp_path, *journal_of(1)) / "journal.jsonl"
    path.write_text(f"{path.read_text()}{line}\n")
    with pytest.raises(RunFolderError, match=r"journal\.jsonl:3: expected"):
        Follower(path).poll()


def test_a_round_without_its_parts_is_passed_over(tmp_path: Path) -> None:
    follower, rounds = followed(written(tmp_path, *journal_of(1), {"event": "round", "round": 2}) / "journal.jsonl")
    assert follower.poll()
    assert rounds() == [1]


def test_the_status_of_a_run() -> None:
    records = [START, round_record(1), round_record(2, failures=[]), round_record(3, evaluation=None)]
    status = status_of(records)
    assert (status.name, status.state, status.round, status.rounds) == ("demo", "running", 3, 4)
    assert (status.seconds, status.round_seconds, status.seconds_left) == (6.0, 2.0, 2.0)
    assert status.examples_a_second == pytest.approx(3 * 40 / 4.5)
    assert (status.bytes_up, status.bytes_down) == (300, 600)
    assert status.phases == {"train": 0.5, "exchange": 1.5, "merge": 0.25, "evaluate": 0.25}
    accuracy = status.series("held_out/accuracy")
    assert accuracy is not None
    assert (accuracy.at, accuracy.values) == ((1, 2), (0.5, 0.5))
    assert status.series("held_out/groups/films & more/accuracy") is not None
    assert status.series("drift") is None
    first, third = status.nodes
    assert (first.partition, first.updates, first.last_round, first.failures, first.examples) == (0, 3, 3, 0, 120)
    assert (third.partition, third.updates, third.last_round, third.failures) == (3, 0, 0, 2)
    (trouble,) = status.troubles
    assert (trouble.partition, trouble.kind, trouble.count, trouble.last_round) == (3, "no answer in time", 2, 3)


def test_a_failure_is_of_the_kind_on_record_whatever_its_words_seem_to_say() -> None:
    def failed(kind: str, reason: str) -> dict[str, Any]:
        return {"partition": 3, "kind": kind, "reason": reason}

    words = "the deadline of my memory is not finite"
    records = [
        START,
        round_record(1, failures=[failed("failed", words)]),
        round_record(2, failures=[failed("failed", "another word"), failed("refused", words)], refused={"2": "peft"}),
        {"event": "missed", "round": 3, "failures": [failed("absent", words)]},
        {"event": "resume", "round": 2},
        round_record(3, failures=[]),
    ]
    status = status_of(records)
    assert [(each.partition, each.kind, each.count, each.last_round) for each in status.troubles] == [
        (3, "failed", 2, 2),
        (2, "refused", 1, 2),
        (3, "absent", 1, 3),
        (3, "refused", 1, 2),
    ]
    assert status.troubles[1].words == "peft"
    assert "refused" in shown(status)


@pytest.mark.parametrize(
    ("records", "state", "why"),
    [
        ([], "not begun", ""),
        ([START], "running", ""),
        ([*journal_of(4), END], "ended", "completed"),
        ([*journal_of(2), {**END, "stopped": "early"}], "ended", "early"),
        ([*journal_of(2), FAILED], "failed", FAILED["reason"]),
        ([*journal_of(2), FAILED, {"event": "resume", "round": 2}], "running", ""),
    ],
)
def test_the_state_of_a_run(records: list[dict[str, Any]], state: str, why: str) -> None:
    status = status_of(records)
    assert (status.state, status.why) == (state, why)
    assert (status.seconds_left is not None) == (state == "running" and status.round > 0)
    assert state in shown(status)
    assert state in "\n".join(plain_lines(status, 0.0))


def test_rounds_that_a_resumed_run_went_back_behind_are_gone() -> None:
    status = status_of([*journal_of(3), {"event": "resume", "round": 1}, round_record(2, loss=9.0)])
    loss = status.series("loss")
    assert loss is not None
    assert (loss.at, loss.values, status.resumed) == ((1, 2), (1.0, 9.0), 1)


@pytest.mark.parametrize("quarantined", [{"3": "sent nan"}, {3: "sent nan"}, [3]])
def test_a_site_in_quarantine_stands_first(quarantined: object) -> None:
    text = shown(status_of([START, round_record(1, quarantined=quarantined)]))
    assert "quarantined" in text
    assert text.index("quarantined") < text.index("failures (1)")


def test_a_silent_run_is_told_as_one() -> None:
    status = status_of(journal_of(2))
    assert "may have stopped" in shown(status, silent=3600)
    assert "may have stopped" not in shown(status, silent=5)
    assert "may have stopped" not in shown(status_of([*journal_of(4), END]), silent=3600)


@pytest.mark.parametrize(("width", "height"), [(40, 10), (80, 24), (120, 60), (200, 100)])
def test_the_picture_fits_the_terminal(width: int, height: int) -> None:
    clients = [{"partition": p, "loss": 0.5, "examples": 4, "seconds": 0.5, "rank": 8} for p in range(100)]
    failures = [{"partition": p, "reason": "no answer within the deadline"} for p in range(100, 120)]
    rounds = [round_record(number, clients=clients, failures=failures) for number in range(1, 300)]
    text = shown(status_of([START, *rounds]), width=width, height=height)
    assert max(map(len, text.splitlines())) <= width
    assert len(text.splitlines()) <= max(height, 34)


def test_what_a_node_says_cannot_forge_a_line_or_a_colour() -> None:
    record = round_record(1, failures=[{"partition": 3, "reason": HOSTILE}])
    record["evaluation"]["groups"] = {HOSTILE: {"accuracy": 0.5, "rows": 1}}
    status = status_of(
        [{**START, "config": {**START["config"], "name": HOSTILE}}, record, {**FAILED, "reason": HOSTILE}]
    )
    for text in (shown(status), "\n".join(plain_lines(status, 0.0))):
        assert not {"\x1b", "‮"} & set(text)
        assert not [line for line in text.splitlines() if line.strip().startswith("forged")]
        assert "[bold]x[/]" in text


@pytest.mark.parametrize(
    ("values", "width", "bars"),
    [
        ([], 5, ""),
        ([1.0], 5, "▄"),
        ([2.0, 2.0], 5, "▄▄"),
        ([0.0, 1.0], 5, "▁█"),
        ([0.0, 0.0, 7.0, 7.0], 2, "▁█"),
        (list(range(8)), 8, "▁▂▃▄▅▆▇█"),
    ],
)
def test_a_sparkline_goes_from_the_least_to_the_greatest(values: list[float], width: int, bars: str) -> None:
    assert sparkline(values, width) == bars


def command(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fedpeft", "watch", *arguments], cwd=folder, capture_output=True, text=True, timeout=60
    )


def test_a_run_is_shown_once_in_plain_text(tmp_path: Path) -> None:
    written(tmp_path / "run", *journal_of(4), END)
    done = command("run", "--once", folder=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("run: demo, ended (completed)\nrounds: 4 of 4, ")
    assert "failed: site 3, 4 times, last in round 4: no answer within the deadline" in done.stdout
    assert "\x1b" not in done.stdout


def test_a_failed_run_ends_the_command_with_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written(tmp_path, *journal_of(2), FAILED)
    assert run_watch(tmp_path, once=False, as_json=True) == 1
    assert json.loads(capsys.readouterr().out)["why"] == FAILED["reason"]


def test_a_folder_without_a_journal_has_not_begun(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_watch(tmp_path, once=True, as_json=False) == 0
    assert "not begun" in capsys.readouterr().out


@pytest.mark.parametrize("once", [True, False])
def test_a_folder_that_is_not_there_is_told(tmp_path: Path, once: bool) -> None:
    with pytest.raises(RunFolderError, match="expected a run folder, found none"):
        run_watch(tmp_path / "none", once=once, as_json=False, wait_seconds=0.1)


def test_a_run_is_followed_from_before_it_begins_until_it_ends(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"

    def go_on() -> None:
        for record in (*journal_of(2), {"event": "resume", "round": 2}, round_record(3), END):
            time.sleep(0.3)
            written(run, record)

    writer = threading.Thread(target=go_on)
    writer.start()
    assert run_watch(run, once=False, as_json=True) == 0
    writer.join()
    seen = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert seen[0]["state"] == "not begun"
    assert seen[-1]["state"] == "ended"
    rounds = [status["round"] for status in seen]
    assert rounds == sorted(rounds)
    assert {1, 2, 3} <= set(rounds)


def test_a_terminal_gets_a_live_picture(tmp_path: Path) -> None:
    written(tmp_path, *journal_of(4), END)
    parent, child = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "fedpeft", "watch", str(tmp_path)],
        stdin=child,
        stdout=child,
        stderr=child,
        env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "100", "LINES": "50"},
    )
    os.close(child)
    text = b""
    try:
        while chunk := os.read(parent, 65536):
            text += chunk
    except OSError:
        pass
    os.close(parent)
    assert process.wait(60) == 0
    assert "by round" in text.decode()
    assert "▁" in text.decode()


def test_a_status_is_a_value() -> None:
    status = status_of(journal_of(2))
    assert status == status_of(journal_of(2))
    assert status != replace(status, round=1)
