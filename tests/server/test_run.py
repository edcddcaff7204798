from __future__ import annotations

import re
from pathlib import Path

import pytest

from fedpeft.errors import ConfigError, FederationError
from server.run import Attempts, Run, last_words, main, see_through

FULL = "round-000002.safetensors: expected room for 9 bytes, found No space left on device; free disk space."
FLOWER = f"""Using SuperLink: lab (127.0.0.1:59173)
\x1b[92mINFO \x1b[0m:      Start `flwr-serverapp` process
warning: round 1: the node of partition 1 failed: another reason, an error
\x1b[91mERROR \x1b[0m:     ServerApp raised an exception: {FULL}
\x1b[91mERROR \x1b[0m:     Exit Code: 201

An unhandled exception occurred in the ServerApp.

For more information, visit: <https://flower.ai/docs/framework/1.41/en/ref-exit-codes/201.html>
"""


@pytest.mark.parametrize(
    ("log", "words"),
    [
        (FLOWER, FULL),
        ("INFO: fine\nConnectionError: nobody there\n", "ConnectionError: nobody there"),
        ("INFO: fine\n", ""),
        ("", ""),
        (f"ServerApp raised an exception: {'x' * 10_000}", "x" * 500),
    ],
)
def test_the_reason_of_an_end_is_the_sentence_of_the_exception(log: str, words: str) -> None:
    assert last_words(log) == words


def test_a_setting_that_flower_does_not_pass_on_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--set: expected no double quotes.*; write a list as a,b"):
        main("simulations/demo.toml", tmp_path / "out", ['adapter.lora.target_modules=["query"]'])


@pytest.mark.parametrize("seen_at_work", [True, False])
def test_where_flower_sees_first_that_a_process_is_gone_the_reason_says_so(
    seen_at_work: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failed(Run):
        """A run whose process was killed, as Flower tells at once."""

        def start(self) -> str:
            return "7"

        def status(self, number: str) -> str:
            return {"7": "finished:failed"}[number]

        def _log(self, number: str) -> str:
            return {"7": "INFO: killed\n"}[number]

    at_work = iter([seen_at_work])
    monkeypatch.setattr("server.run.taken", lambda _: next(at_work, False))
    monkeypatch.setattr("server.run._LOOK_SECONDS", 0.0)
    monkeypatch.setattr("server.run._POLL_SECONDS", 0.0)
    run = Failed("lab", tmp_path, "simulations/demo.toml", (), {})
    why = "the process of the run's server is gone" if seen_at_work else "nothing in its log"
    with pytest.raises(FederationError, match=f"found finished:failed: {why}; mend that"):
        see_through(run, Attempts(most=1, pause_seconds=0.0), lambda _: None)


@pytest.mark.parametrize(
    ("log", "why"), [(FLOWER, FULL), ("INFO: killed\n", "the process of the run's server is gone")]
)
def test_where_nobody_is_at_work_any_more_the_reason_is_what_was_raised_if_anything(
    log: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Deserted(Run):
        """A run whose process works for a moment; Flower holds it for running ever after."""

        def start(self) -> str:
            return "7"

        def status(self, number: str) -> str:
            return "running"

        def stop(self, number: str) -> None:
            stopped.append(number)

        def _log(self, number: str) -> str:
            return {"7": log}[number]

    at_work, stopped = iter([True]), list[str]()
    monkeypatch.setattr("server.run.taken", lambda _: next(at_work, False))
    monkeypatch.setattr("server.run._LOOK_SECONDS", 0.0)
    monkeypatch.setattr("server.run._POLL_SECONDS", 0.0)
    run = Deserted("lab", tmp_path, "simulations/demo.toml", (), {})
    with pytest.raises(FederationError, match=f"a round gained in 1 attempts, found {re.escape(why.rstrip('.'))}"):
        see_through(run, Attempts(most=1, pause_seconds=0.0), lambda _: None)
    assert stopped == ["7"]


def test_a_run_that_somebody_stopped_is_not_begun_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stopped(Run):
        """A run that the operator has ended with `flwr stop`."""

        def start(self) -> str:
            started.append("7")
            return "7"

        def status(self, number: str) -> str:
            return {"7": "finished:stopped"}[number]

        def _log(self, number: str) -> str:
            return {"7": ""}[number]

    started = list[str]()
    monkeypatch.setattr("server.run._LOOK_SECONDS", 0.0)
    monkeypatch.setattr("server.run._POLL_SECONDS", 0.0)
    run = Stopped("lab", tmp_path, "simulations/demo.toml", (), {})
    with pytest.raises(FederationError, match="found that it was stopped after 0 rounds; call this again to go on"):
        see_through(run, Attempts(pause_seconds=0.0), lambda _: None)
    assert started == ["7"]
