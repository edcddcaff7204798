"""Flower's command line as the server's scripts call it; a script of the test's own stands in for `flwr`."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from fedpeft.errors import FederationError
from server.flwr_calls import Flwr
from server.nodes import Register
from server.run import Run

Says = Callable[..., dict[str, str]]


@pytest.fixture
def says(tmp_path: Path) -> Says:
    """An environment in which `flwr` prints what it is told to, and ends as it is told to."""

    def made(output: str = "", words: str = "", status: int = 0) -> dict[str, str]:
        program = tmp_path / "bin" / "flwr"
        program.parent.mkdir(exist_ok=True)
        (tmp_path / "output").write_text(output)
        (tmp_path / "words").write_text(words)
        program.write_text(
            f'#!/bin/sh\nprintf "%s\\n" "$@" > {tmp_path}/asked\npwd >> {tmp_path}/asked\n'
            f"cat {tmp_path}/output\ncat {tmp_path}/words >&2\nexit {status}\n"
        )
        program.chmod(0o755)
        return {"PATH": f"{program.parent}{os.pathsep}{os.environ['PATH']}"}

    return made


@pytest.fixture
def asked(tmp_path: Path) -> Callable[[], list[str]]:
    """The arguments of the last call, and the folder that it came from."""
    return lambda: (tmp_path / "asked").read_text().splitlines()


@pytest.mark.parametrize(
    ("output", "words", "status", "answer"),
    [
        ('{"success": true, "n": 1}', "", 0, {"success": True, "n": 1}),
        ('Using SuperLink lab\n{"success": false}\n', "a warning", 1, {"success": False}),
        ("", "Connection is unavailable\n", 1, {"error-message": "Connection is unavailable\n"}),
        ("something else", "", 0, {"error-message": "something else"}),
        ("{broken", "", 0, {"error-message": "{broken"}),
    ],
)
def test_an_answer_is_an_object_or_the_words_in_its_place(
    says: Says, asked: Callable[[], list[str]], output: str, words: str, status: int, answer: dict[str, object]
) -> None:
    assert Flwr(says(output, words, status), 30.0).answer("ls", "lab") == answer
    assert asked()[:-1] == ["ls", "lab", "--format", "json"]


def test_a_command_that_fails_hangs_or_is_not_there_says_so(says: Says, tmp_path: Path) -> None:
    assert Flwr(says("log", "no such run", 1), 30.0).printed("log", "7") == "logno such run"
    assert Flwr(says("log", "a warning", 0), 30.0).printed("log", "7") == "log"
    env = says()
    (tmp_path / "bin" / "flwr").write_text("#!/bin/sh\nexec sleep 600\n")
    assert Flwr(env, 0.2).answer("ls") == {"error-message": "no answer within 0.2 seconds"}
    (tmp_path / "bin" / "flwr").unlink()
    assert "cannot be called" in Flwr({"PATH": str(tmp_path / "bin")}, 30.0).printed("ls")


def test_a_run_is_started_watched_and_asked_for_its_reason(
    says: Says, asked: Callable[[], list[str]], tmp_path: Path
) -> None:
    def run(env: dict[str, str]) -> Run:
        return Run("lab", tmp_path / "out", "simulations/demo.toml", ("rounds=2", "name=a b"), env)

    assert run(says('{"success": true, "run-id": 42}')).start() == "42"
    *arguments, folder = asked()
    out = f'out="{tmp_path / "out"}" config="simulations/demo.toml" set="rounds=2 \'name=a b\'"'
    assert arguments == ["run", ".", "lab", "-c", out, "--format", "json"]
    assert Path(folder) == Path(__file__).parents[2]
    listed = '{"runs": [{"run-id": 41, "status": "finished:failed"}, {"run-id": 42, "status": "running"}]}'
    assert [run(says(listed)).status(number) for number in ("42", "41", "40")] == ["running", "finished:failed", ""]
    assert run(says("", "unavailable", 1)).status("42") == ""
    assert run(says("INFO fine\nError: it   broke\nINFO end\n")).reason("42") == "Error: it broke"
    with pytest.raises(FederationError, match="flwr run: expected a new run, found the SuperLink is away; see that"):
        run(says("", "the SuperLink\n is away", 1)).start()


def test_what_the_superlink_refuses_is_told_in_a_sentence(
    says: Says, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusals = {
        '{"success": false, "error-message": "Error: Public key already in use."}': "found Public key already in use;",
        "Using SuperLink lab\nConnection to the SuperLink is unavailable": "found Connection to the SuperLink is un",
    }
    for output, expected in refusals.items():
        env = says(output)
        monkeypatch.setattr("server.nodes.flower_environment", lambda *_, env=env: env)
        with pytest.raises(FederationError, match=f"list: expected the SuperLink's consent, {expected}"):
            Register(tmp_path, "lab").list()
