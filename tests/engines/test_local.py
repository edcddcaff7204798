from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from fedpeft.client import FitJob
from fedpeft.engines.local import LocalTransport, answer
from fedpeft.errors import CheckpointError
from fedpeft.memory import FolderMemory
from fedpeft.merges import Pruning
from fedpeft.requests import describe_request, evaluate_request, fit_request
from fedpeft.stages import keep_local
from fedpeft.strategy import build
from fedpeft.wire import Failure, Packet
from tests.toys import RUN, SESSION, WIDE, WIDE_SESSION, Toy, flat, parts, site, state, strategy, transport, wide_state

REQUEST = fit_request(strategy(), state(0, 0, 0), SESSION, 0)


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


def test_a_trained_reply_says_how_long_each_phase_took_and_is_as_long_whatever_is_known(tmp_path: Path) -> None:
    plain = answer(REQUEST, site(0), FolderMemory(tmp_path))
    timed = answer(REQUEST, site(0), FolderMemory(tmp_path), {"receive": 0.25, "send": 1.5})
    phases = [{key: value for key, value in reply.manifest.items() if ".seconds." in key} for reply in (plain, timed)]
    train = [float(found.pop("metric.seconds.train")) for found in phases]
    assert phases[0] == {"metric.seconds.receive": -1.0, "metric.seconds.send": -1.0}
    assert phases[1] == {"metric.seconds.receive": 0.25, "metric.seconds.send": 1.5}
    for seconds, reply in zip(train, (plain, timed), strict=True):
        assert 0 <= seconds <= float(reply.manifest["metric.seconds"])
    assert plain.size_bytes == timed.size_bytes
    asked = evaluate_request(strategy(), state(), SESSION, 0)
    assert not [key for key in answer(asked, site(0), FolderMemory(tmp_path)).manifest if ".seconds." in key]


@pytest.mark.parametrize(
    ("request_", "breaks", "kind"),
    [
        (REQUEST, broken, "failure"),
        (evaluate_request(strategy(), state(), SESSION, 0), None, "evaluation"),
        (describe_request(state(), SESSION), None, "description"),
    ],
)
def test_a_failed_fit_an_evaluation_and_a_description_keep_no_memory(
    tmp_path: Path, request_: Packet, breaks: Callable[[FitJob], None] | None, kind: str
) -> None:
    store = FolderMemory(tmp_path)
    reply = answer(request_, site(0, learner=Toy(0, breaks=breaks)), store)
    assert reply.kind == kind
    assert not (tmp_path / RUN).exists()


def test_a_description_is_of_what_the_node_is_before_the_round(tmp_path: Path) -> None:
    """A round that is done again asks a node whose first try has pruned it further."""
    plan, store = build(parts(pruning=Pruning(0.5, 0.1))), FolderMemory(tmp_path)
    own = site(0, plan, Toy(0, spec=WIDE))
    said = []
    for _ in range(2):
        said.append(answer(describe_request(wide_state(), WIDE_SESSION), own, store).manifest["rank"])
        reply = answer(fit_request(plan, wide_state(), WIDE_SESSION, 0), own, store)
        assert reply.manifest["rank"] == 2
    assert said == [0, 0]
    later = answer(describe_request(wide_state(1), WIDE_SESSION), own, store)
    assert later.manifest["rank"] == 2


def test_an_evaluation_uses_the_memory_of_the_round_it_scores(tmp_path: Path) -> None:
    plan, learner, store = strategy(keep_local(["head.*"])), Toy(0), FolderMemory(tmp_path)
    for round_ in (0, 1):
        answer(fit_request(plan, state(0, 0, 0, round_=round_), SESSION, 0), site(0, plan), store)
    first = answer(evaluate_request(plan, state(round_=1), SESSION, 0), site(0, plan, learner), store)
    second = answer(evaluate_request(plan, state(round_=2), SESSION, 0), site(0, plan, learner), store)
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


def test_a_request_that_comes_twice_is_answered_with_the_same_bytes(tmp_path: Path) -> None:
    # A message may be delivered again, after a crash or by a network; each try begins from the memory before its round.
    memories = FolderMemory(tmp_path)
    first = fit_request(strategy(), state(), SESSION, 0)
    later = fit_request(strategy(), state(1, 1, 1, round_=1), SESSION, 0)
    answers = [answer(packet, site(0), memories) for packet in (first, first, later, later, first)]
    assert answers[0].body == answers[1].body == answers[4].body
    assert answers[2].body == answers[3].body
    assert memories.load(RUN, 0, 2).fields == {"position": 1}
