from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedpeft import checkpoint, cohort_choice
from fedpeft.cohort_choice import ALONE
from fedpeft.cohort_layers import WAYS
from fedpeft.config import RunConfig
from fedpeft.config.run import ComputeConfig
from fedpeft.engines import cohorts
from fedpeft.engines.cohorts import Cohorts, cohorts_of
from fedpeft.errors import CheckpointError
from fedpeft.federate import federate
from fedpeft.requests import fit_request
from fedpeft.runs import RunFolder
from fedpeft.updates import ServerState
from fedpeft.wire import Failure
from tests import tiny, toys

pytestmark = pytest.mark.usefixtures("one_thread")
TOGETHER = next(iter(WAYS))
ON = ComputeConfig(threads=1, cohort="on")


def run(config: RunConfig, compute: ComputeConfig, *, resume: bool = False) -> tuple[ServerState, list[dict[str, Any]]]:
    folder = RunFolder(Path(config.out))
    transport = replace(tiny.transport(config, folder), cohorts=cohorts_of(compute, folder.cohort))
    records = federate(config, folder, transport, engine="local", resume=resume)
    return checkpoint.load(folder.checkpoint), records


def plan(source: Path, rows: Path, out: Path, ranks: tuple[int, ...]) -> RunConfig:
    """A run whose clients keep tensors of their own, at unlike ranks; in a run of one rank, with control variates."""
    return tiny.run_config(
        source,
        rows,
        out,
        federation={"clients": 5, "cohort": 4, "ranks": {"rule": "listed", "listed": {"ranks": list(ranks)}}},
        aggregation={"stages": {"local": ["*.B"]}, "merge": {"rule": "zero_pad"}},
        training={"scaffold": len(ranks) == 1},
    )


@pytest.mark.parametrize("ranks", [(3,), (3, 1)], ids=str)
def test_a_federation_that_trains_together_comes_to_what_one_by_one_comes_to(
    tiny_model: Path, tiny_rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ranks: tuple[int, ...]
) -> None:
    sizes: list[int] = []
    fit = cohorts.fit_cohort
    monkeypatch.setattr(cohorts, "fit_cohort", lambda m, *more: (sizes.append(len(m)), fit(m, *more))[1])
    apart, records = run(plan(tiny_model, tiny_rows, tmp_path / "apart", ranks), replace(ON, cohort="off"))
    assert not sizes
    found, others = run(plan(tiny_model, tiny_rows, tmp_path / "together", ranks), ON)
    assert sizes == [4] * 4
    for key, value in apart.adapter.tensors.items():
        assert found.adapter.tensors[key] == pytest.approx(value, abs=2e-4)
    for record, other in zip(records, others, strict=True):
        assert record["event"] == other["event"]
        if record["event"] == "round":
            assert (record["cohort"], record["bytes_up"]) == (other["cohort"], other["bytes_up"])
            assert all(client["seconds"] > 0 for client in other["clients"])
    assert json.loads((tmp_path / "together" / "cohort.json").read_text()) == {"cohort": TOGETHER}


def test_a_resumed_run_repeats_the_choice_that_was_made_and_ends_at_the_same_bits(
    tiny_model: Path, tiny_rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = run(plan(tiny_model, tiny_rows, tmp_path / "whole", (3, 1)), ON)
    config = plan(tiny_model, tiny_rows, tmp_path / "stopped", (3, 1))
    fit, calls = cohorts.fit_cohort, iter(range(99))

    def killed(*told: Any) -> Any:
        if next(calls) == 2:
            raise KeyboardInterrupt
        return fit(*told)

    monkeypatch.setattr(cohorts, "fit_cohort", killed)
    with pytest.raises(KeyboardInterrupt):
        run(config, ON)
    monkeypatch.setitem(cohort_choice.CHOICES, "auto", lambda *_: pytest.fail("it has been chosen already"))
    resumed, _ = run(config, replace(ON, cohort="auto"), resume=True)
    assert resumed.round == whole.round
    for key, value in whole.adapter.tensors.items():
        assert np.array_equal(resumed.adapter.tensors[key], value)


def test_a_family_that_is_not_served_trains_one_by_one_and_says_so_once(
    tiny_model: Path, tiny_rows: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    changes = {"adapter": {"family": "fish_mask"}, "data": {"server_rows": 6}}
    states = []
    for name in ("on", "off"):
        config = tiny.run_config(tiny_model, tiny_rows, tmp_path / name, **changes)
        with caplog.at_level(logging.WARNING, logger="fedpeft"):
            states.append(run(config, replace(ON, cohort=name))[0])
    assert [record.getMessage() for record in caplog.records if "one by one" in record.getMessage()] == [
        "clients train one by one, not together: the layers of fish_mask cannot be computed for several clients"
    ]
    for key, value in states[1].adapter.tensors.items():
        assert np.array_equal(states[0].adapter.tensors[key], value)


@pytest.mark.parametrize(("slow", "expected"), [("alone", TOGETHER), ("together", ALONE)])
def test_what_is_faster_is_taken(
    tiny_model: Path, tiny_rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slow: str, expected: str
) -> None:
    seconds = iter([9.0, 1.0] * 2 if slow == "alone" else [1.0, 9.0] * 2)
    monkeypatch.setattr(cohort_choice, "_timed", lambda work: (work(), next(seconds))[1])
    config = tiny.run_config(tiny_model, tiny_rows, tmp_path / "run", rounds=1)
    short = replace(config, training=replace(config.training, steps=300))
    config = replace(short, evaluation=replace(short.evaluation, every=0))
    run(config, replace(ON, cohort="auto"))
    assert json.loads((tmp_path / "run" / "cohort.json").read_text()) == {"cohort": expected}


@pytest.mark.parametrize(("steps", "most_tokens", "expected"), [(2, 256, ALONE), (60, 256, TOGETHER), (60, 1, ALONE)])
def test_a_run_too_short_for_measuring_trains_small_batches_together_where_checking_pays(
    tiny_model: Path,
    tiny_rows: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    steps: int,
    most_tokens: int,
    expected: str,
) -> None:
    monkeypatch.setattr(cohort_choice, "_SMALL_TOKENS", most_tokens)
    config = tiny.run_config(tiny_model, tiny_rows, tmp_path / "run", rounds=1)
    config = replace(config, training=replace(config.training, steps=steps))
    run(replace(config, evaluation=replace(config.evaluation, every=0)), replace(ON, cohort="auto"))
    assert json.loads((tmp_path / "run" / "cohort.json").read_text()) == {"cohort": expected}


@pytest.mark.parametrize("content", ["", "[]", '{"cohort": "somehow"}'])
def test_a_record_that_was_not_written_here_is_refused(
    tiny_model: Path, tiny_rows: Path, tmp_path: Path, content: str
) -> None:
    config = tiny.run_config(tiny_model, tiny_rows, tmp_path / "run")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "cohort.json").write_text(content)
    with pytest.raises(CheckpointError, match="delete it to choose anew"):
        run(config, ON)


def test_toys_without_a_model_answer_as_before(tmp_path: Path) -> None:
    local = toys.transport(3, tmp_path / "one")
    packets = dict.fromkeys((2, 0), fit_request(toys.strategy(), toys.state(0, 0, 0), toys.SESSION, 0))
    plain = dict(local.exchange(packets, 60))
    other = replace(toys.transport(3, tmp_path / "two"), cohorts=Cohorts(ON, tmp_path / "cohort.json"))
    found = dict(other.exchange(packets, 60))
    assert list(found) == [2, 0]
    assert [reply.body for reply in found.values()] == [reply.body for reply in plain.values()]  # type: ignore[union-attr]
    assert dict(other.exchange(packets, -1.0)) == dict.fromkeys((2, 0), Failure("no answer within the deadline"))
    assert not (tmp_path / "cohort.json").exists()
