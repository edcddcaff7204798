"""The command line, as a user meets it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from fedpeft.cli import main


class Result(NamedTuple):
    """What a command left behind."""

    returncode: int
    stdout: str
    stderr: str


Command = Callable[..., Result]


@pytest.fixture
def fedpeft(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, one_thread: None) -> Command:
    """The command, run in this process as if started in `folder`."""

    def run(*arguments: str, folder: Path) -> Result:
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", ["fedpeft", *arguments])
        capfd.readouterr()
        try:
            main()
            code: object = 0
        except SystemExit as stop:
            code = stop.code or 0
        return Result(int(str(code)), *capfd.readouterr())

    return run


def in_a_process(*arguments: str, folder: Path, **environment: str) -> Result:
    """The command in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "fedpeft", *arguments],
        cwd=folder,
        env={**os.environ, "COLUMNS": "100", **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return Result(done.returncode, done.stdout, done.stderr)


def settings(tiny_run: str, folder: Path) -> Path:
    path = folder / "run.toml"
    path.write_text(tiny_run, encoding="utf-8")
    return path


def one_sentence(result: Result, *parts: str) -> None:
    """A user's mistake: exit code 2, one line that names what it should, and no traceback."""
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, lines
    for part in ("expected", "found", *parts):
        assert part in lines[0]


def test_help_names_every_command_and_needs_no_torch(tmp_path: Path) -> None:
    result = in_a_process("--help", folder=tmp_path)
    assert result.returncode == 0
    for command in ("simulate", "check", "data", "report", "export", "new", "assets"):
        assert command in result.stdout
    code = "import sys, fedpeft.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_completion_can_be_shown(tmp_path: Path) -> None:
    disabled = {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    result = in_a_process("--show-completion", "bash", folder=tmp_path, **disabled)
    assert result.returncode == 0
    assert "complete" in result.stdout


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("training.step=3", ("training.step", "training.steps")),
        ("rounds=0", ("rounds", "at least 1")),
        ("federation.cohort=99", ("federation", "cohort")),
        ("adapter.family=lorra", ("adapter.family", "lora")),
        ("model.source=no/such-model", ("model.source",)),
        ("data.origin.jsonl.columns.text=sentence", ("sentence",)),
        ("data.partition.least_rows=1000", ("partition",)),
        ("data.origin.jsonl.path=absent.jsonl", ("absent.jsonl",)),
        ("adapter.lora.target_modules=nowhere", ("adapter.lora",)),
        ("aggregation.stages.frozen=nothing*", ("nothing*",)),
    ],
)
def test_a_mistake_ends_in_one_sentence_and_writes_nothing(
    fedpeft: Command, tiny_run: str, tmp_path: Path, override: str, parts: tuple[str, ...]
) -> None:
    path = settings(tiny_run, tmp_path)
    result = fedpeft("simulate", str(path), "--set", "out=run", "--set", override, folder=tmp_path)
    one_sentence(result, *parts)
    assert not (tmp_path / "run").exists()


def test_a_run_folder_in_the_way_is_left_alone(fedpeft: Command, tiny_run: str, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("mine", encoding="utf-8")
    result = fedpeft("simulate", str(settings(tiny_run, tmp_path)), "--set", "out=run", folder=tmp_path)
    one_sentence(result, "run", "--resume")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["mine.txt"]


def test_neither_settings_nor_a_run_is_a_mistake(fedpeft: Command, tmp_path: Path) -> None:
    one_sentence(fedpeft("simulate", folder=tmp_path), "--resume")


def test_resuming_what_is_not_a_run_is_a_mistake_in_a_process_too(tmp_path: Path) -> None:
    one_sentence(in_a_process("simulate", "--resume", "absent", folder=tmp_path), "absent")


def test_a_run_from_settings_to_export(fedpeft: Command, tiny_run: str, tmp_path: Path) -> None:
    path = settings(tiny_run, tmp_path)
    checked = fedpeft("check", str(path), folder=tmp_path)
    assert checked.returncode == 0, checked.stderr
    assert "a client sends" in checked.stdout

    shown = fedpeft("data", str(path), "--picture", "who.png", folder=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert (tmp_path / "who.png").stat().st_size > 1000

    ran = fedpeft("simulate", str(path), "--set", "out=run", folder=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert "federation" in ran.stdout
    assert "pooled data" in ran.stdout
    names = {item.name for item in (tmp_path / "run").iterdir()}
    assert {"adapter", "checkpoint", "config.toml", "journal.jsonl", "report.html"} <= names

    assert fedpeft("report", "run", "--pictures", "plots", folder=tmp_path).returncode == 0
    assert (tmp_path / "plots" / "merge-error.svg").exists()
    assert "| federation |" in fedpeft("report", "run", "--markdown", folder=tmp_path).stdout
    assert "| run |" in fedpeft("report", "run", "run", "--markdown", folder=tmp_path).stdout
    assert fedpeft("export", "run", "--out", "merged", "--merged", folder=tmp_path).returncode == 0
    assert (tmp_path / "merged" / "model.safetensors").exists()
    one_sentence(fedpeft("export", "run", "--out", "merged", folder=tmp_path), "merged")
    one_sentence(fedpeft("simulate", "--resume", "run", "--set", "rounds=9", folder=tmp_path), "rounds=9")


def test_a_new_project_is_a_flower_app_that_checks(fedpeft: Command, tmp_path: Path) -> None:
    made = fedpeft("new", "my-hospital", folder=tmp_path)
    assert made.returncode == 0, made.stderr
    project = tmp_path / "my-hospital"
    checked = fedpeft("check", "simulations/first.toml", folder=project)
    assert checked.returncode == 0, checked.stderr
    built = subprocess.run(
        [str(Path(sys.executable).with_name("flwr")), "build"],
        cwd=project,
        env={**os.environ, "FLWR_HOME": str(tmp_path / "flwr")},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    imported = [sys.executable, "-c", "import clients.app, server.app; clients.app.app, server.app.app"]
    assert subprocess.run(imported, cwd=project, timeout=120, check=False).returncode == 0
    one_sentence(fedpeft("new", "my-hospital", folder=tmp_path), "my-hospital")
    one_sentence(fedpeft("new", "not a name", folder=tmp_path), "not a name")
