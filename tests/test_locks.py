from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fedpeft import locks
from fedpeft.errors import RunFolderError
from fedpeft.locks import LOCK, held, taken

HOLD = """
import os, sys
from pathlib import Path
from fedpeft.locks import held
with held(Path(sys.argv[1])):
    child = os.fork() if sys.argv[2:] else -1
    if child:
        print(child, flush=True)
    sys.stdin.read()
"""


@contextmanager
def holding(folder: Path, *more: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A process that has the folder, and the number of the one that it has split off, if it was to."""
    line = [sys.executable, "-c", HOLD, str(folder), *more]
    with subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process, int(process.stdout.readline())
        finally:
            process.kill()


def test_a_second_process_is_told_the_number_of_the_first(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with holding(folder) as (process, _), pytest.raises(RunFolderError) as caught, held(folder):
        pass
    assert str(caught.value) == (
        f"{folder}: expected a run folder that no other process writes, found process {process.pid} at work in it; "
        "wait for that one or end it, or choose another folder."
    )


def test_a_folder_is_free_again_once_its_process_has_ended_or_was_killed(tmp_path: Path) -> None:
    with holding(tmp_path) as (process, _):
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert (tmp_path / LOCK).read_text() == str(process.pid)
        with held(tmp_path):
            assert (tmp_path / LOCK).read_text() == str(os.getpid())
    assert list(tmp_path.iterdir()) == []
    with held(tmp_path):
        pass


def test_two_in_one_process_exclude_each_other_too(tmp_path: Path) -> None:
    with held(tmp_path), pytest.raises(RunFolderError, match=f"found process {os.getpid()} at work"), held(tmp_path):
        pass
    with held(tmp_path):
        pass


def test_what_a_process_has_split_off_does_not_keep_its_folder(tmp_path: Path) -> None:
    with holding(tmp_path, "fork") as (process, child):
        try:
            process.send_signal(signal.SIGKILL)
            process.wait()
            os.kill(child, 0)
            with held(tmp_path):
                pass
        finally:
            os.kill(child, signal.SIGKILL)


def test_a_lock_on_a_file_that_its_holder_has_removed_is_not_taken_for_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flock, calls = fcntl.flock, []

    def late(handle: int, how: int) -> None:
        calls.append(how)
        if len(calls) == 1:
            (tmp_path / LOCK).unlink()
        flock(handle, how)

    monkeypatch.setattr(locks.fcntl, "flock", late)
    with held(tmp_path):
        assert len(calls) == 2
        with pytest.raises(RunFolderError, match="at work in it"), held(tmp_path):
            pass


def test_a_disk_without_locks_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(handle: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(locks.fcntl, "flock", refuse)
    with held(tmp_path):
        assert "knows no locks" in caplog.text


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match="expected a folder that can be written"), held(tmp_path / "file" / "run"):
        pass


def test_whether_a_folder_is_taken_can_be_asked_from_outside(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert not taken(folder)
    with holding(folder) as (process, _):
        assert taken(folder)
        process.kill()
        process.wait()
        assert (folder / LOCK).exists()
        assert not taken(folder)
    with held(folder):
        assert taken(folder)
    assert not taken(folder)
