"""A run that is killed before any one of its writes, and taken up again, ends with the same bytes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import tiny

ROOT = Path(__file__).parent.parent

# Forks a run for each of its writes, in which the process ends, without a word, just before that write. "Write" is
# what the operating system is asked: open a file to write in, rename, remove. The child that goes on has no hook.
DRIVER = """
import json, os, sys

def in_a_child(act, folder, kill_at):
    child = os.fork()
    if not child:
        left = kill_at
        def hook(event, arguments):
            nonlocal left
            opens = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)
            if (opens or event in ("os.rename", "os.remove")) and str(folder) in str(arguments[0]):
                left -= 1
                if left == 0:
                    os._exit(9)
        if kill_at:
            sys.addaudithook(hook)
        try:
            act(folder)
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

def try_every_write(act, look, root):
    assert in_a_child(act, root / "whole", 0) == 0
    expected, points, wrong = look(root / "whole"), 0, []
    while True:
        points += 1
        folder = root / f"killed-{points}-"
        code = in_a_child(act, folder, points)
        if code == 0:
            break
        again = in_a_child(act, folder, 0)
        if (code, again) != (9, 0) or look(folder) != expected:
            wrong.append([points, code, again])
    print(json.dumps({"points": points, "wrong": wrong, "expected": expected}))
"""

TOY = """
from pathlib import Path
from fedpeft import checkpoint, journal
from fedpeft.stages import keep_local
from tests.toys import federate, flat, plan, strategy

def act(folder):
    federate(folder, plan(rounds=3), plan=strategy(keep_local(["head.*"])))

def look(folder):
    rounds = [record.get("round") for record in journal.read(folder / "journal.jsonl")]
    return [flat(checkpoint.load(folder / "checkpoint").adapter.tensors), rounds]

try_every_write(act, look, Path(sys.argv[1]))
"""

WHOLE = """
from dataclasses import replace
from pathlib import Path
from fedpeft import checkpoint, experiment, journal
from fedpeft.federate import federate, silent
from fedpeft.runs import RunFolder, reopen
from tests import tiny

root, source, rows = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
stages = {"aggregation": {"stages": {"local": ["classifier.bias"]}}}
made = tiny.run_config(source, rows, root, rounds=2, **stages)
experiment.evaluator_of(made)

class Enough(BaseException):
    pass

def enough(record):
    if record["round"] == 2:
        raise Enough

def act(folder):
    begun = (folder / "config.toml").exists()
    config = reopen(folder, [])[1] if begun else replace(made, out=str(folder))
    run = RunFolder(folder)
    try:
        federate(config, run, tiny.transport(config, run), engine="local", resume=begun,
                 watcher=replace(silent(), round=enough))
    except Enough:
        pass

def look(folder):
    tensors = checkpoint.load(folder / "checkpoint").adapter.tensors
    records = journal.read(folder / "journal.jsonl")
    rounds = [record["round"] for record in records if record["event"] == "round"]
    return [{key: value.tobytes().hex() for key, value in tensors.items()}, rounds]

try_every_write(act, look, root)
"""


def drive(*arguments: str) -> dict[str, Any]:
    code, *rest = arguments
    made = subprocess.run(
        [sys.executable, "-c", DRIVER + code, *rest], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert made.returncode == 0, made.stderr
    found: dict[str, Any] = json.loads(made.stdout)
    return found


@pytest.mark.faults
def test_a_kill_before_any_write_of_the_round_loop_changes_nothing_of_its_end(tmp_path: Path) -> None:
    told = drive(TOY, str(tmp_path))
    assert told["wrong"] == []
    # Three rounds of two memories (a file opened and renamed), a journal line, and a checkpoint of two files.
    assert told["points"] > 3 * (2 * 2 + 1 + 2 * 2)
    assert told["expected"][1] == [None, 1, 2, 3]


@pytest.mark.faults
def test_a_kill_before_any_write_of_a_run_changes_nothing_of_its_end(tmp_path: Path) -> None:
    source, rows = tiny.build(tmp_path / "model"), tiny.write_rows(tmp_path / "rows.jsonl")
    told = drive(WHOLE, str(tmp_path / "runs"), str(source), str(rows))
    assert told["wrong"] == []
    assert told["points"] > 2 * (2 * 2 + 1 + 2 * 2)
    assert told["expected"][1] == [1, 2]
