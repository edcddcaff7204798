"""Where workers come from: a process that imports early and computes nothing."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from fedpeft.engines import nursery
from fedpeft.engines.worker import like_parent
from fedpeft.imports import importing


def begun(path: Path, *told: str, folder: Path) -> list[str]:
    """The command lines of the processes that there are once `begin` has returned, in a process of its own."""
    code = f"""
import psutil
from pathlib import Path
from fedpeft.engines import nursery
if __name__ == "__main__":
    nursery.begin(Path({str(path)!r}), {list(told)!r}, None)
    print(*(" ".join(one.cmdline()) for one in psutil.Process().children()), sep="\\n")
"""
    (folder / "code.py").write_text(code)
    done = subprocess.run([sys.executable, "code.py"], cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.stderr == ""
    return [line for line in done.stdout.splitlines() if "forkserver" in line]


@pytest.mark.parametrize(
    ("told", "processes"),
    [
        (("compute.workers=2", "compute.threads=2"), 1),
        ((), 0),
        (("compute.workers=0",), 0),  # refused later, in words
        (("no.such=1",), 0),
    ],
)
def test_it_begins_where_there_will_be_workers(
    tiny_run: str, tmp_path: Path, told: tuple[str, ...], processes: int
) -> None:
    (tmp_path / "run.toml").write_text(tiny_run, encoding="utf-8")
    assert len(begun(tmp_path / "run.toml", *told, folder=tmp_path)) == processes


def test_settings_that_are_not_there_are_left_to_whoever_runs_them(tmp_path: Path) -> None:
    assert begun(tmp_path / "none.toml", folder=tmp_path) == []
    nursery.begin(None, [], tmp_path / "no run")
    nursery.begin(None, [], None)


def test_where_there_are_no_forks_workers_are_new_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert nursery.context().get_start_method() == "forkserver"
    monkeypatch.setattr(nursery, "FORKS", False)
    assert nursery.context().get_start_method() == "spawn"


def test_garbage_is_looked_for_again_after_imports() -> None:
    before = gc.get_freeze_count()
    try:
        with importing():
            assert not gc.isenabled()
        assert gc.isenabled()
        assert gc.get_freeze_count() > before
    finally:
        gc.unfreeze()


def told(pipe: Connection, environment: dict[str, str]) -> None:
    before = os.environ.get("FEDPEFT_LATE")
    like_parent(environment)
    pipe.send((before, dict(os.environ)))


def test_a_worker_has_the_environment_of_the_run_and_not_of_what_it_is_a_fork_of(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    context = nursery.context()
    for late in ("first", "second"):
        monkeypatch.setenv("FEDPEFT_LATE", late)
        ours, theirs = context.Pipe()
        process = context.Process(target=told, args=(theirs, dict(os.environ)), daemon=True)
        process.start()
        assert ours.poll(60)
        before, found = ours.recv()
        process.join(10)
        assert found == dict(os.environ)
    assert before != "second"  # else nothing was to be seen
