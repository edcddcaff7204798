"""Sinks of real runs: the same result with and without them, and each round once, also where a run was killed."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fedpeft import journal
from fedpeft.config import RunConfig
from fedpeft.errors import QuorumError
from fedpeft.federate import Watcher, federate, silent
from fedpeft.runs import RunFolder, folder_for, reopen
from fedpeft.wire import Failure
from tests import tiny
from tests.tiny import transport

pytestmark = pytest.mark.usefixtures("one_thread")
BOTH = {"sinks": ["tensorboard", "prometheus"]}


class Killed(BaseException):
    """Stands for a kill: nothing in the run catches it."""


@pytest.fixture
def config(tiny_model: Path, tiny_rows: Path, tmp_path: Path) -> Callable[..., RunConfig]:
    def made(out: str, **changes: Any) -> RunConfig:
        return tiny.run_config(tiny_model, tiny_rows, tmp_path / out, **changes)

    return made


def carried_out(config: RunConfig, watcher: Watcher | None = None) -> Path:
    folder = folder_for(config)
    federate(config, folder, transport(config, folder), engine="local", watcher=watcher)
    return folder.root


def deployed(root: Path) -> dict[str, bytes]:
    return {key: value.tobytes() for key, value in load_file(root / "adapter" / "adapter_model.safetensors").items()}


def losses(folder: Path) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in EventAccumulator(str(folder)).Reload().Scalars("loss")]


def settled(root: Path) -> list[tuple[int, float]]:
    records = journal.read(root / "journal.jsonl")
    return [(record["round"], pytest.approx(record["loss"])) for record in records if record["event"] == "round"]


def test_the_result_is_the_same_to_the_bit_with_sinks_and_without(config: Callable[..., RunConfig]) -> None:
    plain = carried_out(config("plain"))
    watched = carried_out(config("watched", observation=BOTH))
    assert deployed(watched) == deployed(plain)
    assert losses(watched / "tensorboard") == settled(plain)
    assert 'fedpeft_round{run="tiny"} 4.0' in (watched / "metrics.prom").read_text()


def test_a_run_that_was_killed_goes_on_in_its_sinks(config: Callable[..., RunConfig]) -> None:
    def killed(record: dict[str, Any]) -> None:
        if record["round"] == 2:
            raise Killed

    made = config("run", observation=BOTH)
    with pytest.raises(Killed):
        carried_out(made, replace(silent(), round=killed))
    folder, again = reopen(Path(made.out), [])
    federate(again, folder, transport(again, folder), engine="local", resume=True)
    assert losses(folder.root / "tensorboard") == settled(folder.root)
    assert 'fedpeft_rounds_total{run="tiny"} 4.0' in (folder.root / "metrics.prom").read_text()


def test_a_run_may_be_resumed_with_other_sinks(config: Callable[..., RunConfig]) -> None:
    def killed(record: dict[str, Any]) -> None:
        if record["round"] == 2:
            raise Killed

    made = config("run")
    with pytest.raises(Killed):
        carried_out(made, replace(silent(), round=killed))
    folder, again = reopen(Path(made.out), ["observation.sinks=tensorboard"])
    federate(again, folder, transport(again, folder), engine="local", resume=True)
    assert losses(folder.root / "tensorboard") == settled(folder.root)


class Absent:
    """A federation none of whose nodes answers."""

    def partitions(self) -> tuple[int, ...]:
        return (0, 1, 2)

    def exchange(self, requests: Any, timeout_seconds: float) -> Any:
        yield from ((partition, Failure("row: Ada\nLovelace")) for partition in requests)


def test_a_run_that_fails_says_so_in_journal_sinks_and_log(
    config: Callable[..., RunConfig], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "fedpeft")
    made = config("run", observation=BOTH)
    folder = RunFolder(Path(made.out))
    with pytest.raises(QuorumError):
        federate(made, folder, Absent(), engine="local")
    last = json.loads(folder.journal.read_text().splitlines()[-1])
    assert (last["event"], last["error"]) == ("failed", "QuorumError")
    assert "Ada Lovelace" in last["reason"]
    assert 'fedpeft_failed{run="tiny"} 1.0' in (folder.root / "metrics.prom").read_text()
    assert "the run failed: round 1: expected at least" in caplog.text
    assert "Ada" not in caplog.text


def test_a_failed_run_goes_on_with_no_trace_but_of_the_round_that_was_missed(config: Callable[..., RunConfig]) -> None:
    made = config("run")
    folder = RunFolder(Path(made.out))
    with pytest.raises(QuorumError):
        federate(made, folder, Absent(), engine="local")
    _, again = reopen(Path(made.out), [])
    records = federate(again, folder, transport(again, folder), engine="local", resume=True)
    assert [record["event"] for record in records] == ["start", "missed", "resume", *["round"] * 4, "end"]
