"""A run that is killed before any one of its writes, and taken up again, ends with the same bytes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Forks a run for each of its writes, in which the process ends, without a word, just before that write. "Write" is
# what the operating system is asked: open a file to write in, rename, remove. The child that goes on has no hook.
DRIVER = """
import json, os, sys
from pathlib import Path
from tests.toys import federate, flat, plan, strategy
from fedpeft.stages import keep_local

root, local = Path(sys.argv[1]), json.loads(sys.argv[2])
chosen = strategy(keep_local(local)) if local else strategy()
WRITES = ("os.rename", "os.remove")

def go(folder, kill_at=0):
    child = os.fork()
    if not child:
        left = kill_at
        def hook(event, arguments):
            nonlocal left
            writes = event in WRITES or (event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR))
            if writes:
                left -= 1
                if left == 0:
                    os._exit(9)
        if kill_at:
            sys.addaudithook(hook)
        try:
            final = federate(folder, plan(rounds=3), plan=chosen)
            (folder / "final").write_text(json.dumps(flat(final.adapter.tensors)))
        finally:
            os._exit(0 if (folder / "final").exists() else 1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

assert go(root / "whole") == 0
expected = (root / "whole" / "final").read_text()
points, wrong = 0, []
while True:
    points += 1
    folder = root / f"killed-{points}"
    code = go(folder, points)
    if code == 0:
        break
    resumed = go(folder)
    if (code, resumed) != (9, 0) or (folder / "final").read_text() != expected:
        wrong.append([points, code, resumed])
print(json.dumps({"points": points, "wrong": wrong, "expected": expected}))
"""


@pytest.mark.faults
@pytest.mark.parametrize("local", [[], ["head.*"]])
def test_a_kill_before_any_write_changes_no_bit_of_the_end(tmp_path: Path, local: list[str]) -> None:
    made = subprocess.run(
        [sys.executable, "-W", "error", "-c", DRIVER, str(tmp_path), json.dumps(local)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert made.returncode == 0, made.stderr
    told = json.loads(made.stdout)
    assert told["wrong"] == []
    # Three rounds of two memories (a file opened and renamed), a journal line, and a checkpoint of two files.
    assert told["points"] > 3 * (2 * 2 + 1 + 2 * 2)
    assert len(json.loads(told["expected"])) == 3
