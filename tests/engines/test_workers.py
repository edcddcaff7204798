from __future__ import annotations

import functools
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from fedpeft import checkpoint, models
from fedpeft.config import RunConfig, load, override
from fedpeft.config.run import ComputeConfig
from fedpeft.engines import workers
from fedpeft.engines.workers import WorkersTransport, local_transport, parts_of, threads_of
from fedpeft.errors import ConfigError
from fedpeft.experiment import adapted_model, plan_of, resolve, start_of, strategy_of
from fedpeft.federate import federate
from fedpeft.memory import FolderMemory
from fedpeft.requests import fit_request
from fedpeft.runs import RunFolder
from fedpeft.shared_base import _frozen, adopt, share
from fedpeft.updates import ServerState
from fedpeft.wire import Failure, Packet
from tests import tiny
from tests.test_kill import rounds_done

pytestmark = pytest.mark.usefixtures("one_thread")
FIVE = {"federation": {"clients": 5, "cohort": 4}, "aggregation": {"stages": {"local": ["*.B"]}}}


def plan(source: Path, rows: Path, out: Path, *told: str, **changes: Any) -> RunConfig:
    """A run whose clients keep tensors and control variates of their own."""
    made = tiny.run_config(source, rows, out, **{**FIVE, "training": {"scaffold": True}, **changes})
    return override(made, list(told))


def run(config: RunConfig, *, resume: bool = False) -> tuple[ServerState, list[dict[str, Any]]]:
    folder = RunFolder(Path(config.out))
    with local_transport(config, folder) as transport:
        records = federate(config, folder, transport, engine="local", resume=resume)
    return checkpoint.load(folder.checkpoint), records


def asked(config: RunConfig, partitions: tuple[int, ...]) -> dict[int, Packet]:
    """A first round's request to each of `partitions`."""
    strategy, spec = strategy_of(config), adapted_model(config).spec
    state = strategy.init("0" * 16, config.seed, start_of(config))
    return {p: fit_request(strategy, state, plan_of(config, state.run, spec.digest).session, p) for p in partitions}


TWO = ("compute.threads=2", "compute.workers=2")


@pytest.fixture
def over(tiny_model: Path, tiny_rows: Path, tmp_path: Path) -> Iterator[WorkersTransport]:
    folder = RunFolder(tmp_path / "run")
    config = plan(tiny_model, tiny_rows, folder.root, *TWO)
    with local_transport(config, folder) as transport:
        assert isinstance(transport, WorkersTransport)
        yield transport


def equal(one: ServerState, other: ServerState) -> bool:
    return all(np.array_equal(other.adapter.tensors[key], value) for key, value in one.adapter.tensors.items())


def remembered(out: Path) -> dict[str, bytes]:
    root = RunFolder(out).memories
    return {"/".join(path.relative_to(root).parts[1:]): path.read_bytes() for path in sorted(root.glob("*/*/*"))}


@pytest.mark.parametrize("spare", [0, 1])
def test_two_workers_come_to_the_bits_of_one_and_remember_the_same(
    tiny_model: Path, tiny_rows: Path, tmp_path: Path, spare: int
) -> None:
    told = ("federation.cohort=3", f"federation.spare={spare}")
    one, records = run(plan(tiny_model, tiny_rows, tmp_path / "one", *told))
    two, others = run(plan(tiny_model, tiny_rows, tmp_path / "two", *told, *TWO))
    assert equal(one, two)
    assert one.round == two.round == 4
    assert remembered(tmp_path / "one")
    assert remembered(tmp_path / "one") == remembered(tmp_path / "two")
    asked_of = [[record["cohort"] for record in found if record["event"] == "round"] for found in (records, others)]
    assert asked_of[0] == asked_of[1]
    assert others[0]["config"]["compute.workers"] == 2


@pytest.mark.parametrize("cohort", ["off", "on"])
def test_a_run_that_is_stopped_and_gone_on_with_ends_at_the_same_bits(
    tiny_model: Path, tiny_rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cohort: str
) -> None:
    told = (*TWO, f"compute.cohort={cohort}")
    whole, _ = run(plan(tiny_model, tiny_rows, tmp_path / "whole", *told))
    config, calls, save = plan(tiny_model, tiny_rows, tmp_path / "stopped", *told), iter(range(99)), FolderMemory.save

    def killed(*arguments: Any) -> None:
        save(*arguments)
        if next(calls) == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(FolderMemory, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            run(config)
    resumed, _ = run(config, resume=True)
    assert resumed.round == whole.round
    assert equal(resumed, whole)
    assert remembered(tmp_path / "stopped") == remembered(tmp_path / "whole")
    assert (tmp_path / "whole" / "cohort.json").exists() == (cohort == "on")


def all_ready(over: WorkersTransport) -> None:
    """Every worker has begun: one may have answered for all clients before the other had."""
    deadline = time.monotonic() + 60
    while not all(worker.ready for worker in over._workers):
        assert time.monotonic() < deadline
        list(over.exchange(asked(over.config, (0,)), 60))


def test_clients_of_a_worker_that_dies_are_tried_by_another_and_the_log_says_so(
    over: WorkersTransport, caplog: pytest.LogCaptureFixture
) -> None:
    plain = dict(over.exchange(asked(over.config, (0, 1, 2, 3)), 60))
    all_ready(over)
    second = next(worker for worker in over._workers if worker.number == 1)
    os.kill(second.process.pid or 0, signal.SIGSTOP)  # it is handed a client and cannot answer
    replies = over.exchange(asked(over.config, (0, 1, 2, 3)), 60)
    found = dict([next(replies)])
    assert second.part is not None
    with caplog.at_level(logging.WARNING, logger="fedpeft"):
        os.kill(second.process.pid or 0, signal.SIGKILL)
        found |= dict(replies)
    assert [p for p, reply in found.items() if isinstance(reply, Packet) and reply.kind == "update"] == [0, 1, 2, 3]
    assert {p: reply.body for p, reply in found.items()} == {p: reply.body for p, reply in plain.items()}  # type: ignore[union-attr]
    assert [record.levelname for record in caplog.records if "ended (code -9)" in record.getMessage()] == ["WARNING"]
    assert len(over._workers) == 2


def test_a_client_whose_workers_always_die_is_a_failure_and_the_others_answer(
    over: WorkersTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    hand_out = workers._Exchange._hand_out

    def deadly(one: Any) -> None:
        hand_out(one)
        for worker in over._workers:
            if worker.part is not None and 1 in worker.part.requests:
                os.kill(worker.process.pid or 0, signal.SIGKILL)

    monkeypatch.setattr(workers._Exchange, "_hand_out", deadly)
    found = dict(over.exchange(asked(over.config, (0, 1, 2)), 60))
    assert isinstance(found[1], Failure)
    assert "worker process ended" in found[1].reason
    assert all(isinstance(found[p], Packet) for p in (0, 2))


def test_who_would_begin_after_the_deadline_is_a_failure(over: WorkersTransport) -> None:
    assert list(over.exchange(asked(over.config, (1, 0)), -1.0)) == [
        (p, Failure("no answer within the deadline")) for p in (1, 0)
    ]


def test_the_base_is_in_memory_once(tiny_model: Path, tiny_rows: Path, tmp_path: Path) -> None:
    config = plan(tiny_model, tiny_rows, tmp_path, *TWO, "seed=77")
    wide = tiny.build_wide(tmp_path / "wide")
    config = replace(config, model=replace(config.model, source=str(wide)))
    with local_transport(config, RunFolder(tmp_path)) as over:
        assert isinstance(over, WorkersTransport)
        list(over.exchange(asked(config, (0,)), 60))
        all_ready(over)
        list(over.exchange(asked(config, (0, 1)), 60))  # each of them answers for one
        base = over._base[0]
        assert base.size_bytes > 2_000_000
        for worker in over._workers:
            maps = psutil.Process(worker.process.pid).memory_maps(grouped=False)
            own = [each for each in maps if "fedpeft-base" in each.path]
            assert len(own) == 1
            assert own[0].rss > 0.9 * base.size_bytes  # it reads all of it there
            assert own[0].private_dirty + own[0].private_clean < 0.05 * base.size_bytes  # and has none for itself


def test_what_one_writes_into_the_base_nobody_else_sees(tiny_model: Path, tiny_rows: Path, tmp_path: Path) -> None:
    config = plan(tiny_model, tiny_rows, tmp_path).model
    config = replace(config, source=str(tiny.build_wide(tmp_path / "wide")))
    one, other = (models.load(config, tiny.FAMILIES["lora"].build(), tiny.HEAD, 0) for _ in range(2))
    before = {name: tensor.clone() for name, tensor in _frozen(one).items()}
    shared = share(one)
    assert adopt(other, shared) == sum(tensor.nbytes for tensor in before.values()) > 0
    assert all(bool((tensor == before[name]).all()) for name, tensor in _frozen(other).items())
    with torch.no_grad():
        for tensor in _frozen(one).values():
            tensor.fill_(7)
    assert all(bool((tensor == before[name]).all()) for name, tensor in _frozen(other).items())
    os.close(shared.descriptor)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL], ids=["interrupted", "killed"])
def test_no_process_outlives_the_run(tiny_run: str, tmp_path: Path, how: signal.Signals) -> None:
    (tmp_path / "run.toml").write_text(tiny_run, encoding="utf-8")
    told = [f"--set={each}" for each in (*TWO, "rounds=2000", "out=run")]
    command = [sys.executable, "-m", "fedpeft", "simulate", "run.toml", "--no-bounds", "--quiet", *told]
    # A shell's background jobs, in which tests may run, pay no heed to Ctrl-C, and what they start does not either.
    heeding = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heeding
    )
    try:
        deadline = time.monotonic() + 60
        while not rounds_done(tmp_path / "run"):
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.05)
        family = psutil.Process(process.pid).children(recursive=True)
        # Two workers, and the process that they are forks of.
        assert len([each for each in family if "forkserver" in " ".join(each.cmdline())]) == 3
        process.send_signal(how)
        process.communicate(timeout=30)
        assert psutil.wait_procs(family, timeout=15)[1] == []
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        (("compute.workers=-1",), "compute.workers"),
        (("compute.threads=2", "compute.workers=3"), "lower compute.workers, or raise compute.threads"),
    ],
)
def test_workers_that_make_no_sense_are_refused(
    tiny_run: str, tmp_path: Path, told: tuple[str, ...], expected: str
) -> None:
    (tmp_path / "run.toml").write_text(tiny_run, encoding="utf-8")
    with pytest.raises(ConfigError, match=expected):
        load(tmp_path / "run.toml", list(told))


@pytest.mark.parametrize(
    ("told", "cores", "expected"),
    [
        ((), 8, 3),  # no more than clients that train in a round
        ((), 2, 2),
        (("compute.threads=1",), 8, 1),
        (("compute.threads=2",), 8, 2),
        (("compute.workers=1",), 8, 1),
        (("compute.workers=5",), 2, 5),  # said so, and refused where they are to be started
    ],
)
def test_workers_that_are_left_open_are_as_many_as_cores(
    tiny_run: str, tmp_path: Path, told: tuple[str, ...], cores: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run.toml").write_text(tiny_run.replace("compute = { threads = 1 }", ""), encoding="utf-8")
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    config = load(tmp_path / "run.toml", ["compute.workers=0", "federation.cohort=3", *told])
    assert resolve(config).compute.workers == config.workers_on(cores) == expected


def test_clients_and_threads_are_divided() -> None:
    assert parts_of([3, 1, 4, 5, 9], 2) == [[3, 1], [4, 5, 9]]
    assert parts_of([7], 2) == [[7]]
    assert [len(part) for part in parts_of(list(range(40)), 2)] == [13, 13, 14]
    assert [threads_of(ComputeConfig(threads=5, workers=many)) for many in (1, 2, 5)] == [5, 2, 1]


def test_more_workers_than_cores_are_refused_before_anything_is_started(tiny_run: str, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(tiny_run, encoding="utf-8")
    config = load(tmp_path / "run.toml", ["compute.threads=0", "compute.workers=4096"])
    with (
        pytest.raises(ConfigError, match="the cores of this machine, found 4096"),
        local_transport(config, RunFolder(tmp_path / "run")),
    ):
        pytest.fail("it was begun")
