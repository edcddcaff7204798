from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from fedpeft.client import FitJob
from fedpeft.engines.local import LocalTransport, answer
from fedpeft.errors import CheckpointError
from fedpeft.memory import FolderMemory
from fedpeft.stages import keep_local
from fedpeft.wire import Failure, Packet, evaluate_request, fit_request
from tests.toys import RUN, SESSION, Toy, flat, site, state, strategy, transport

REQUEST = fit_request(strategy(), state(0, 0, 0), SESSION)


def broken(job: FitJob) -> None:
    raise RuntimeError("broken")


def test_every_partition_is_there_and_answers_in_turn(tmp_path: Path) -> None:
    local = transport(3, tmp_path)
    assert local.partitions() == (0, 1, 2)
    replies = dict(local.exchange(dict.fromkeys((2, 0), REQUEST), 60))
    assert list(replies) == [2, 0]
    assert {partition: reply.manifest["partition"] for partition, reply in replies.items()} == {2: 2, 0: 0}  # type: ignore[union-attr]


def test_a_client_is_called_only_when_its_reply_is_taken(tmp_path: Path) -> None:
    asked: list[int] = []

    def of(partition: int) -> object:
        asked.append(partition)
        return site(partition)

    replies = LocalTransport(2, of, FolderMemory(tmp_path)).exchange({0: REQUEST, 1: REQUEST}, 60)  # type: ignore[arg-type]
    assert asked == []
    next(replies)
    assert asked == [0]


def test_a_client_that_would_begin_after_the_deadline_is_a_failure(tmp_path: Path) -> None:
    local = transport(2, tmp_path)
    replies = list(local.exchange(dict.fromkeys((0, 1), REQUEST), -1.0))
    assert replies == [(p, Failure("no answer within the deadline")) for p in (0, 1)]
    assert not (tmp_path / RUN).exists()


def test_memory_is_read_before_and_kept_after(tmp_path: Path) -> None:
    store = FolderMemory(tmp_path)
    reply = answer(REQUEST, site(0), store)
    assert store.load(RUN, 0, 2).fields == {"position": 1}
    assert store.load(RUN, 0, 1).fields == {}
    assert reply.manifest["metric.seconds"] >= 0  # type: ignore[operator]
    again = answer(REQUEST, site(0), store)
    assert again.body == reply.body
    assert store.load(RUN, 0, 2).fields == {"position": 1}


@pytest.mark.parametrize("breaks", [broken, None])
def test_a_failed_fit_and_an_evaluation_keep_no_memory(tmp_path: Path, breaks: Callable[[FitJob], None] | None) -> None:
    store = FolderMemory(tmp_path)
    request = REQUEST if breaks else evaluate_request(strategy(), state(), SESSION)
    reply = answer(request, site(0, learner=Toy(0, breaks=breaks)), store)
    assert reply.kind == ("failure" if breaks else "evaluation")
    assert not (tmp_path / RUN).exists()


def test_an_evaluation_uses_the_memory_of_the_round_it_scores(tmp_path: Path) -> None:
    plan, learner, store = strategy(keep_local(["head.*"])), Toy(0), FolderMemory(tmp_path)
    for round_ in (0, 1):
        answer(fit_request(plan, state(0, 0, 0, round_=round_), SESSION), site(0, plan), store)
    first = answer(evaluate_request(plan, state(round_=1), SESSION), site(0, plan, learner), store)
    second = answer(evaluate_request(plan, state(round_=2), SESSION), site(0, plan, learner), store)
    # Half of the way to 4, and from there a third of the rest.
    assert first.manifest["metric.accuracy"] == 2.0
    assert second.manifest["metric.accuracy"] == pytest.approx(2 + 2 / 3)
    assert flat(learner.seen[0].tensors) == [2, 0, 0]


def test_a_full_disk_under_a_memory_ends_the_run_in_words(tmp_path: Path) -> None:
    (tmp_path / RUN).write_text("in the way")
    local = replace(transport(1, tmp_path), memories=FolderMemory(tmp_path))
    with pytest.raises(CheckpointError, match="free disk space"):
        list(local.exchange({0: REQUEST}, 60))


def test_a_request_of_another_round_is_answered_from_its_own_memory(tmp_path: Path) -> None:
    store = FolderMemory(tmp_path)
    for round_ in (1, 2, 3):
        answer(Packet("fit", {**REQUEST.manifest, "round": round_}, REQUEST.body), site(0), store)
    assert store.load(RUN, 0, 9).fields == {"position": 3}
    answer(Packet("fit", {**REQUEST.manifest, "round": 2}, REQUEST.body), site(0), store)
    assert store.load(RUN, 0, 3).fields == {"position": 2}
