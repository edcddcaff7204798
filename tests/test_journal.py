"""The journal: what is appended is read back, a torn line never happened, a corrupt one is named."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeft import journal
from fedpeft.errors import FedPeftError

SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8)
RECORDS = st.dictionaries(st.text(), VALUES).map(lambda record: {**record, "event": "note"})


def rounds_of(records: list[dict[str, object]]) -> list[object]:
    return [record["round"] for record in records if record["event"] == "round"]


@settings(max_examples=40)
@given(records=st.lists(RECORDS, max_size=4))
def test_read_gives_back_what_append_was_given(records, tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "journal.jsonl"
    path.touch()
    for record in records:
        journal.append(path, record)
    assert journal.read(path) == records


@settings(max_examples=40)
@given(records=st.lists(RECORDS, min_size=1, max_size=3), data=st.data())
def test_a_journal_cut_anywhere_holds_its_whole_lines_and_takes_new_ones(records, data, tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "journal.jsonl"
    for record in records:
        journal.append(path, record)
    whole = path.read_bytes()
    cut = whole[: data.draw(st.integers(0, len(whole)))]
    path.write_bytes(cut)
    kept = records[: cut.count(b"\n")]
    assert journal.read(path) == kept
    journal.append(path, {"event": "resume", "round": 1})
    assert journal.read(path) == [*kept, {"event": "resume", "round": 1}]


def test_a_torn_line_longer_than_a_block_is_cut_off(tmp_path):
    path = tmp_path / "journal.jsonl"
    path.write_bytes(b'{"event":"start"}\n' + b'{"event":"' + b"x" * 200_000)
    journal.append(path, {"event": "resume"})
    assert path.read_bytes() == b'{"event":"start"}\n{"event":"resume"}\n'


def test_append_makes_the_run_folder_and_writes_numpy_values_as_numbers(tmp_path):
    path = tmp_path / "runs" / "new" / "journal.jsonl"
    record = {
        "event": "round",
        "round": np.int64(3),
        "loss": np.float32(0.5),
        "done": np.bool_(True),
        "norms": np.array([1.0, math.nan]),
        "cohort": (np.int32(1), 2),
        "drift": math.inf,
        "evaluation": {"loss": np.float64("nan"), 7: -math.inf},
    }
    journal.append(path, record)
    assert json.loads(path.read_text()) == {
        "event": "round",
        "round": 3,
        "loss": 0.5,
        "done": True,
        "norms": [1.0, None],
        "cohort": [1, 2],
        "drift": None,
        "evaluation": {"loss": None, "7": None},
    }


@pytest.mark.parametrize(
    "line", ["{", "", "[1]", "null", '{"round":1}', '{"event":"round"}', '{"event":"round","round":"1"}', "\x00" * 9]
)
def test_a_corrupt_line_is_named_by_file_and_number(line, tmp_path):
    path = tmp_path / "journal.jsonl"
    path.write_text(f'{{"event":"start"}}\n{line}\n{{"event":"end"}}\n')
    with pytest.raises(FedPeftError, match=r"journal\.jsonl:2: expected .*, found .*; .*\.$"):
        journal.read(path)


def test_a_line_that_is_not_text_is_named(tmp_path):
    path = tmp_path / "journal.jsonl"
    path.write_bytes(b'\xff\xfe\n{"event":"end"}\n')
    with pytest.raises(FedPeftError, match=r"journal\.jsonl:1"):
        journal.read(path)


@pytest.mark.parametrize("make", [lambda path: None, Path.mkdir])
def test_a_missing_journal_is_one_sentence(make, tmp_path):
    path = tmp_path / "journal.jsonl"
    make(path)
    with pytest.raises(FedPeftError, match=r"journal\.jsonl: expected the journal of a run"):
        journal.read(path)


def test_truncate_keeps_start_resume_missed_and_early_rounds_in_order(tmp_path):
    path = tmp_path / "journal.jsonl"
    events = [
        {"event": "start"},
        {"event": "round", "round": 1},
        {"event": "missed", "round": 2},
        {"event": "resume", "round": 1},
        {"event": "round", "round": 2},
        {"event": "round", "round": 3},
        {"event": "failed"},
        {"event": "bounds", "rows": []},
        {"event": "end"},
    ]
    for event in events:
        journal.append(path, event)
    with path.open("ab") as file:
        file.write(b'{"event":"rou')
    journal.truncate(path, 2)
    assert journal.read(path) == events[:5]
    journal.truncate(path, 0)
    lasting = ("start", "missed", "resume")
    assert journal.read(path) == [event for event in events if event["event"] in lasting]
    assert os.listdir(tmp_path) == ["journal.jsonl"]


def test_a_corrupt_journal_is_not_truncated(tmp_path):
    path = tmp_path / "journal.jsonl"
    path.write_text('{"event":"start"}\nnonsense\n{"event":"end"}\n')
    before = path.read_bytes()
    with pytest.raises(FedPeftError):
        journal.truncate(path, 0)
    assert path.read_bytes() == before


def test_a_journal_whose_writer_is_killed_holds_every_line_that_was_appended(tmp_path):
    path = tmp_path / "journal.jsonl"
    code = (
        "import sys, itertools, pathlib\n"
        "from fedpeft import journal\n"
        "for number in itertools.count(1):\n"
        "    journal.append(pathlib.Path(sys.argv[1]), {'event': 'round', 'round': number, 'pad': 'x' * 5000})\n"
        "    print(number, flush=True)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True) as writer:
        printed = [int(writer.stdout.readline()) for _ in range(20)]
        writer.send_signal(signal.SIGKILL)
        printed += [int(line) for line in writer.stdout if line.endswith("\n")]
    rounds = rounds_of(journal.read(path))
    assert rounds == list(range(1, len(rounds) + 1))
    assert len(rounds) >= printed[-1]


def test_a_run_has_ended_once_its_journal_says_so(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    assert not journal.ended(path)
    journal.append(path, {"event": "round", "round": 1})
    assert not journal.ended(path)
    journal.append(path, {"event": "end"})
    assert journal.ended(path)
