"""Who is asked in a round, how often, and what counts: retries, spares, waiting, and updates that come late."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedpeft import checkpoint, gathering, rounds
from fedpeft.client import handle
from fedpeft.errors import QuorumError
from fedpeft.gathering import cohort_of
from fedpeft.quarantine import Budget
from fedpeft.rounds import step
from fedpeft.updates import Memory, ServerState
from fedpeft.wire import Failure, Packet
from tests.toys import evaluate, flat, honest, nobody, plan, site, state, strategy

Behaviour = Callable[[int, int, Packet], Packet | Failure | None]
"""What a partition answers in its n-th exchange; None is never."""


@dataclass
class Nodes:
    """Nodes that answer in the order of `arrivals`, as `behaves` says, and are connected as `there` says."""

    clients: int
    behaves: Behaviour = lambda partition, time, packet: honest_answer(partition, packet)
    arrivals: tuple[int, ...] = ()
    there: Callable[[int], tuple[int, ...]] | None = None
    asked: list[tuple[int, ...]] = field(default_factory=list)
    looked: int = 0
    coming: list[tuple[int, Packet | Failure]] = field(default_factory=list)

    def partitions(self) -> tuple[int, ...]:
        self.looked += 1
        return self.there(self.looked) if self.there else tuple(range(self.clients))

    def exchange(
        self, requests: Mapping[int, Packet], timeout_seconds: float
    ) -> Iterator[tuple[int, Packet | Failure]]:
        self.asked.append(tuple(requests))
        for partition in [p for p in (self.arrivals or requests) if p in requests]:
            reply = self.behaves(partition, len(self.asked), requests[partition])
            if reply is not None:
                yield partition, reply

    def late(self) -> Iterator[tuple[int, Packet | Failure]]:
        found, self.coming = self.coming, []
        return iter(found)


def honest_answer(partition: int, packet: Packet) -> Packet:
    return handle(packet, Memory(), site(partition))[0]


def failing(*times: tuple[int, int]) -> Behaviour:
    """A partition fails in those exchanges."""
    return lambda partition, time, packet: (
        Failure("the line went dead") if (partition, time) in times else honest_answer(partition, packet)
    )


def bits(found: ServerState) -> list[bytes]:
    return [found.adapter.tensors[key].tobytes() for key in sorted(found.adapter.tensors)]


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gathering, "_PAUSE_SECONDS", 0.001)


def test_who_failed_is_asked_again_and_the_round_is_the_same_to_the_bit() -> None:
    calm, _ = step(strategy(), plan(quorum=0, clients=2), state(), Nodes(2), nobody())
    nodes = Nodes(2, failing((1, 1), (1, 2)))
    told: list[Any] = []
    observer = rounds.Observer(lambda *event: told.append(event), lambda *_: None)
    after, record = step(strategy(), plan(quorum=0, clients=2, retries=2), state(), nodes, observer)
    assert nodes.asked == [(0, 1), (1,), (1,)]
    assert bits(after) == bits(calm)
    assert [client["partition"] for client in record["clients"]] == [0, 1]
    assert record["failures"] == [{"partition": 1, "kind": "absent", "reason": "the line went dead"}] * 2
    assert told == [(1, 0, True), (1, 1, False), (1, 1, False), (1, 1, True)]
    assert record["bytes_down"] == record["clients"][0]["bytes_down"] + record["clients"][1]["bytes_down"]
    assert record["clients"][1]["bytes_down"] == 3 * record["clients"][0]["bytes_down"]


def test_with_a_quorum_nobody_is_asked_twice() -> None:
    nodes = Nodes(2, failing((1, 1)))
    _, record = step(strategy(), plan(quorum=1, clients=2, retries=5), state(), nodes, nobody())
    assert nodes.asked == [(0, 1)]
    assert [client["partition"] for client in record["clients"]] == [0]


def test_retries_come_to_an_end() -> None:
    nodes = Nodes(2, failing(*((1, time) for time in range(9))))
    with pytest.raises(QuorumError, match=r"round 1: expected at least 2 usable updates, found 1 \(partition 1"):
        step(strategy(), plan(quorum=0, clients=2, retries=2), state(), nodes, nobody())
    assert nodes.asked == [(0, 1), (1,), (1,)]


def test_a_node_that_never_answers_is_a_failure_of_each_try() -> None:
    nodes = Nodes(2, lambda partition, time, packet: None if partition else honest_answer(partition, packet))
    _, record = step(strategy(), plan(quorum=1, clients=2, spare=0, carry=True), state(), nodes, nobody())
    assert record["failures"] == [{"partition": 1, "kind": "absent", "reason": "no answer within the deadline"}]


@pytest.mark.parametrize("arrivals", [(2, 0, 1), (0, 2, 1)])
def test_the_first_to_answer_are_taken_and_the_order_of_arrival_does_not_matter(arrivals: tuple[int, ...]) -> None:
    nodes = Nodes(3, arrivals=arrivals)
    after, record = step(strategy(), plan(clients=3, cohort=2, spare=1), state(), nodes, nobody())
    assert nodes.asked == [(0, 1, 2)]
    assert record["cohort"] == [0, 1, 2]
    assert [client["partition"] for client in record["clients"]] == [0, 2]
    assert (record["surplus"], record["failures"]) == ([1], [])
    assert flat(after.adapter.tensors) == [4, 4, 4]  # the mean of half of 4 and half of 12
    assert after.awaited == {1: 0}


def test_an_unusable_answer_does_not_count_among_the_first() -> None:
    def behaves(partition: int, time: int, packet: Packet) -> Packet:
        true = honest_answer(partition, packet)
        return replace(true, manifest={**true.manifest, "round": 9}) if partition == 2 else true

    nodes = Nodes(3, behaves, arrivals=(2, 1, 0))
    _, record = step(strategy(), plan(clients=3, cohort=2, spare=1), state(), nodes, nobody())
    assert [client["partition"] for client in record["clients"]] == [0, 1]
    assert [failure["partition"] for failure in record["failures"]] == [2]
    assert "surplus" not in record


def test_a_round_waits_for_whom_it_would_ask_and_then_goes_on_without() -> None:
    wished = cohort_of(state(), tuple(range(6)), 2, 6)
    others = tuple(p for p in range(6) if p not in wished)
    nodes = Nodes(6, there=lambda looked: others if looked < 4 else tuple(range(6)))
    _, record = step(strategy(), plan(clients=6, wait_seconds=60.0), state(), nodes, nobody())
    assert (nodes.looked, tuple(record["cohort"])) == (4, wished)
    gone = Nodes(6, there=lambda looked: others)
    _, record = step(strategy(), plan(clients=6, wait_seconds=0.02), state(), gone, nobody())
    assert set(record["cohort"]) <= set(others)
    assert record["seconds"]["exchange"] >= 0.02


def test_without_the_quorum_a_round_waits_until_the_deadline() -> None:
    nodes = Nodes(3, there=lambda looked: (0, 1, 2) if looked > 5 else (1,))
    _, record = step(strategy(), plan(clients=3, cohort=3, quorum=3), state(), nodes, nobody())
    assert (nodes.looked, record["cohort"]) == (6, [0, 1, 2])
    never = Nodes(3, there=lambda looked: (1,))
    with pytest.raises(QuorumError, match="expected at least 3 usable updates, found 1"):
        step(strategy(), plan(clients=3, cohort=3, quorum=3, deadline_seconds=0.02), state(), never, nobody())


def test_one_who_is_away_changes_nothing_for_the_others() -> None:
    for round_ in range(20):
        at = state(round_=round_)
        full = cohort_of(at, tuple(range(10)), 4, 10)
        away = next(p for p in range(10) if p not in full)
        assert cohort_of(at, tuple(p for p in range(10) if p != away), 4, 10) == full
        assert set(full) - {full[0]} <= set(cohort_of(at, tuple(p for p in range(10) if p != full[0]), 4, 10))
        assert cohort_of(at, tuple(range(10)), 4) == full


def late_plan(**changes: Any) -> rounds.Plan:
    return plan(clients=2, cohort=2, quorum=1, carry=True, **changes)


def test_a_late_update_counts_in_the_round_after_for_less() -> None:
    # Round 1: partition 0 alone walks from 0 to 2. Round 2: it walks half of the way from 2 to 4, by 1; partition 1's
    # update of round 1, half of the way from 0 to 8, comes late: (1 + 4 w) / (1 + w) with w = 1/√2.
    slow = Nodes(2, lambda partition, time, packet: None if partition else honest_answer(partition, packet))
    first, record = step(strategy(), late_plan(), state(), slow, nobody())
    assert (first.awaited, flat(first.adapter.tensors)) == ({1: 0}, [2, 2, 2])
    slow.coming = [(1, honest(1, 1)), (0, honest(0, 1)), (7, honest(1, 1))]
    second, record = step(strategy(), late_plan(), first, slow, nobody())
    weight = 2**-0.5
    np.testing.assert_allclose(flat(second.adapter.tensors), [2 + (1 + 4 * weight) / (1 + weight)] * 3, rtol=1e-6)
    assert [(client["partition"], client.get("late", False)) for client in record["clients"]] == [(0, False), (1, True)]
    assert second.holdings.keys() == {0}


def test_a_late_update_gives_way_to_one_of_this_round() -> None:
    slow = Nodes(2, lambda partition, time, packet: None if partition else honest_answer(partition, packet))
    first, _ = step(strategy(), late_plan(), state(), slow, nobody())
    with_late, without = Nodes(2), Nodes(2)
    with_late.coming = [(1, honest(1, 1))]
    one, record = step(strategy(), late_plan(), first, with_late, nobody())
    other, _ = step(strategy(), late_plan(), first, without, nobody())
    assert bits(one) == bits(other)
    assert [client["partition"] for client in record["clients"]] == [0, 1]
    assert not any("late" in client for client in record["clients"])


def test_a_late_update_of_an_older_round_is_a_failure_on_record() -> None:
    at = replace(state(1, 1, 1, round_=3), awaited={1: 0})
    nodes = Nodes(2, lambda partition, time, packet: None if partition else honest_answer(partition, packet))
    nodes.coming = [(1, honest(1, 2))]
    _, record = step(strategy(), late_plan(), at, nodes, nobody())
    assert "late: packet 'update', field round: expected 3, found 2" in record["failures"][0]["reason"]


def test_what_is_awaited_survives_a_checkpoint(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, replace(state(), awaited={3: 4, 1: 0}))
    assert checkpoint.load(tmp_path).awaited == {3: 4, 1: 0}


def test_retries_and_spares_go_through_a_whole_run() -> None:
    nodes = Nodes(3, failing((0, 1), (2, 3)))
    made = plan(clients=3, cohort=2, quorum=2, spare=1, retries=1, rounds=3)
    final, stopped = rounds.run(strategy(), made, state(), nodes, evaluate, nobody())
    assert (final.round, stopped) == (3, "completed")


def lying(partition: int, time: int, packet: Packet) -> Packet:
    """Partition 1 answers for another round."""
    true = honest_answer(partition, packet)
    return replace(true, manifest={**true.manifest, "round": 99}) if partition == 1 else true


def test_a_node_that_sends_nonsense_is_not_asked_for_a_while_and_a_resumed_run_remembers(
    tmp_path: Path,
) -> None:
    made = plan(clients=2, cohort=2, quorum=1, budget=Budget(most=2, window=5, rest=3))
    at, asked, barred = state(), [], []
    for _ in range(8):
        nodes = Nodes(2, lying)
        at, record = step(strategy(), made, at, nodes, nobody())
        asked.append(nodes.asked[0])
        barred.append(record.get("quarantined", {}))
        checkpoint.save(tmp_path, at)
        assert checkpoint.load(tmp_path).conduct == at.conduct
    assert asked == [(0, 1), (0, 1), (0,), (0,), (0,), (0, 1), (0, 1), (0,)]
    assert [set(one) for one in barred] == [set(), set(), {"1"}, {"1"}, {"1"}, set(), set(), {"1"}]
    assert "barred for the first time, up to round 5; its last failure: packet 'update', field round" in barred[2]["1"]
    assert "barred for the 2. time, up to round 13" in barred[7]["1"]


def test_a_node_that_is_merely_away_is_asked_again_and_again() -> None:
    made, at = plan(clients=2, cohort=2, quorum=1, budget=Budget(most=1)), state()
    for _ in range(5):
        nodes = Nodes(2, failing((1, 1)))
        at, _ = step(strategy(), made, at, nodes, nobody())
        assert nodes.asked == [(0, 1)]
    assert at.conduct == {}


def test_a_claim_of_more_examples_than_there_can_be_is_refused() -> None:
    def boasts(partition: int, time: int, packet: Packet) -> Packet:
        true = honest_answer(partition, packet)
        return replace(true, manifest={**true.manifest, "examples": 10**9}) if partition else true

    honest_alone, _ = step(strategy(), plan(cohort=1), state(), Nodes(1), nobody())
    after, record = step(strategy(), plan(clients=2, most_examples=100), state(), Nodes(2, boasts), nobody())
    assert bits(after) == bits(honest_alone)
    assert "examples: expected at most 100, found 1000000000" in record["failures"][0]["reason"]
    assert record["failures"][0]["kind"] == "refused"
