import contextlib
import json
import math
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpeft import journal, ranks, rounds
from fedpeft.adapters import AdapterState, at_rank, resized
from fedpeft.client import handle
from fedpeft.config.merges import MERGES
from fedpeft.engines.local import answer
from fedpeft.errors import FedPeftError, QuorumError
from fedpeft.memory import FolderMemory
from fedpeft.merges import rule, with_residual
from fedpeft.ranks import RankRule
from fedpeft.requests import fit_request
from fedpeft.rounds import cohort_of, evaluate_on_clients, in_order, run, step
from fedpeft.stages import keep_local, keep_silent
from fedpeft.strategy import Strategy, build
from fedpeft.updates import Holding, Memory, ServerState
from fedpeft.wire import MOST_MAGNITUDE, Failure, Packet
from tests.toys import (
    RUN,
    SESSION,
    SPEC,
    WIDE,
    WIDE_SESSION,
    Script,
    Toy,
    bits,
    counted,
    evaluate,
    federate,
    flat,
    honest,
    nobody,
    parts,
    plan,
    site,
    state,
    strategy,
    transport,
    wide_state,
)

CONTROLLED = build(replace(parts(), controls=3))


def test_one_round_by_hand(tmp_path: Path) -> None:
    # Clients 0 and 1 walk half way to 4 and 8 with two examples each: the mean delta is 3.
    after, record = step(strategy(), plan(), state(), transport(2, tmp_path), nobody())
    assert flat(after.adapter.tensors) == [3, 3, 3]
    assert after.round == 1
    assert (record["event"], record["round"], record["cohort"], record["failures"]) == ("round", 1, [0, 1], [])
    assert [client["partition"] for client in record["clients"]] == [0, 1]
    assert (record["loss"], record["learning_rate"]) == (0.5, 0.5)
    assert record["update_norm"] == pytest.approx(math.sqrt(27))
    assert record["bytes_up"] == sum(client["bytes_up"] for client in record["clients"])
    assert record["bytes_down"] == sum(client["bytes_down"] for client in record["clients"]) > 24
    seconds = record["seconds"]
    assert {partition: list(phases) for partition, phases in seconds["nodes"].items()} == {
        "0": ["train"],
        "1": ["train"],
    }
    assert all(phases["train"] >= 0 for phases in seconds["nodes"].values())
    assert not [key for client in record["clients"] for key in client if key.startswith("seconds.")]
    assert seconds["total"] == pytest.approx(seconds["exchange"] + seconds["merge"] + seconds["evaluate"])
    journal.append(tmp_path / "journal.jsonl", record)
    assert journal.read(tmp_path / "journal.jsonl")[0]["cohort"] == [0, 1]


def test_two_rounds_by_hand(tmp_path: Path) -> None:
    # Round 2 from 3, a third of the way: 3 + (1 + 5) / 3 / 2 = 4.
    final, stopped = run(strategy(), plan(), state(), transport(2, tmp_path), evaluate, nobody())
    assert flat(final.adapter.tensors) == pytest.approx([4, 4, 4])
    assert (final.round, stopped) == (2, "completed")


def test_a_cohort_is_drawn_without_repeats_and_depends_on_seed_and_round() -> None:
    everyone = tuple(range(10))
    drawn = [cohort_of(state(round_=round_), everyone, 4) for round_ in range(40)]
    assert all(len(set(cohort)) == 4 and list(cohort) == sorted(cohort) for cohort in drawn)
    assert len(set(drawn)) > 30
    assert set().union(*drawn) == set(everyone)
    assert drawn[0] == cohort_of(state(), everyone, 4)
    assert drawn != [cohort_of(replace(state(round_=round_), seed=1), everyone, 4) for round_ in range(40)]
    assert cohort_of(state(), (5, 9), 4) == (5, 9)


def drain(replies: list[tuple[int, Failure]], cohort: tuple[int, ...]) -> list[tuple[int, str]]:
    return [(partition, reply.reason) for partition, reply in in_order(replies, cohort)]  # type: ignore[union-attr]


@given(st.lists(st.tuples(st.integers(0, 6), st.text(max_size=2).map(Failure))), st.sets(st.integers(0, 6)))
def test_in_order_answers_each_of_the_cohort_once_with_its_first_reply(
    replies: list[tuple[int, Failure]], members: set[int]
) -> None:
    cohort = tuple(sorted(members))
    first: dict[int, str] = {}
    for partition, reply in replies:
        first.setdefault(partition, reply.reason)
    expected = [(partition, first.get(partition, "no answer within the deadline")) for partition in cohort]
    assert drain(replies, cohort) == expected


def test_in_order_yields_each_reply_as_soon_as_all_before_it_are_in() -> None:
    taken: list[int] = []

    def arriving() -> Iterator[tuple[int, Failure]]:
        for partition in (2, 9, 0, 0, 1, 3):
            taken.append(partition)
            yield partition, Failure(str(partition))

    replies = in_order(arriving(), (0, 1, 2, 3))
    assert (next(replies)[0], taken) == (0, [2, 9, 0])
    assert (next(replies)[0], taken) == (1, [2, 9, 0, 0, 1])
    assert (next(replies)[0], len(taken)) == (2, 5)
    assert [partition for partition, _ in replies] == [3]


def test_order_of_arrival_changes_no_bit_and_no_record(tmp_path: Path) -> None:
    replies = [(partition, honest(partition)) for partition in range(3)]
    wanted = plan(cohort=3)
    one, first = step(strategy(), wanted, state(), Script(list(replies), 3), nobody())
    two, second = step(strategy(), wanted, state(), Script(replies[::-1], 3), nobody())
    assert flat(one.adapter.tensors) == flat(two.adapter.tensors)
    assert {**first, "seconds": 0} == {**second, "seconds": 0}


def hostile(partition: int = 1, body: bytes | None = None, kind: str = "update", **changes: Any) -> Packet:
    packet = honest(partition)
    return Packet(kind, {**packet.manifest, **changes}, packet.body if body is None else body)


NAN = np.full(3, np.nan, "<f4").tobytes()


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (Failure("node gone"), "node gone"),
        (hostile(body=b""), "12 bytes"),
        (hostile(body=bytes(1000)), "12 bytes"),
        (hostile(body=NAN), "NaN or infinity"),
        (hostile(run="other"), "field run"),
        (hostile(round=2), "field round"),
        (hostile(partition=0), "field partition"),
        (hostile(spec="x"), "field spec"),
        (hostile(config="x"), "field config"),
        (hostile(version="x"), "field version"),
        (hostile(examples=True), "examples"),
        (hostile(examples=0), "examples"),
        (hostile(tokens=-5), "tokens"),
        (hostile(examples=10**18), "examples"),
        (hostile(examples=None), "examples"),
        (hostile(examples=1.5), "examples"),
        (hostile(rank=2), "rank: expected an integer from 1 to 1, found 2"),
        (hostile(rank=0), "rank"),
        (hostile(rank="1"), "rank"),
        (hostile(rank=10**400), "rank"),
        (hostile(body=np.array([1, np.inf, 1], "<f4").tobytes()), "NaN or infinity"),
        (hostile(body=np.array([60, 0, 80.01], "<f4").tobytes()), "expected a norm of at most 100, found 100.008"),
        (hostile(**{"metric.loss": math.nan}), "metric.loss"),
        (hostile(**{"metric.loss": 10**400}), "metric.loss"),
        (hostile(kind="evaluation"), "field kind"),
        (hostile(kind="failure", reason="disk on fire"), "disk on fire"),
        (hostile(kind="failure"), "the node gave no reason"),
    ],
)
def test_an_unusable_reply_is_a_failure_on_record_and_the_round_goes_on(reply: Packet | Failure, reason: str) -> None:
    told: list[tuple[int, int, bool]] = []
    observer = rounds.Observer(lambda *event: told.append(event), lambda *_: None)
    bounded = plan(most_norm=100.0)
    after, record = step(strategy(), bounded, state(), Script([(1, reply), (0, None)]), observer)
    assert flat(after.adapter.tensors) == [2, 2, 2]
    # Whatever it sent, the state is as if it had sent nothing.
    without, _ = step(strategy(), bounded, state(), Script([(1, Failure("away")), (0, None)]), nobody())
    assert bits(after.adapter.tensors) == bits(without.adapter.tensors)
    assert replace(after, adapter=without.adapter) == without
    assert after.holdings.keys() == {0}
    assert [client["partition"] for client in record["clients"]] == [0]
    assert [failure["partition"] for failure in record["failures"]] == [1]
    assert reason in record["failures"][0]["reason"]
    assert told == [(1, 0, True), (1, 1, False)]


def test_a_partition_that_never_answers_is_a_failure() -> None:
    _, record = step(strategy(), plan(), state(), Script([(0, None)]), nobody())
    assert record["failures"] == [{"partition": 1, "kind": "absent", "reason": "no answer within the deadline"}]


def test_what_was_not_asked_or_comes_twice_is_passed_over() -> None:
    script = Script([(7, honest(7)), (0, None), (0, hostile(0, NAN)), (0, None), (1, None), (-1, honest(1))])
    after, record = step(strategy(), plan(), state(), script, nobody())
    assert flat(after.adapter.tensors) == [3, 3, 3]
    assert [client["partition"] for client in record["clients"]] == [0, 1]
    assert record["failures"] == []


@pytest.mark.parametrize("key", ["examples", "tokens", "partition", "bytes_up", "bytes_down"])
@pytest.mark.parametrize("value", [0.0, -2.0, 1e99])
def test_a_metric_cannot_stand_in_for_what_the_server_counts(key: str, value: float) -> None:
    _, plain = step(strategy(), plan(cohort=1), state(), Script([(0, None)], 1), nobody())
    reply = hostile(0, **{f"metric.{key}": value})
    _, record = step(strategy(), plan(cohort=1), state(), Script([(0, reply)], 1), nobody())
    for name in ("examples", "tokens", "partition", "bytes_down"):
        assert record["clients"][0][name] == plain["clients"][0][name]
    assert record["bytes_up"] == reply.size_bytes
    assert record["loss"] == plain["loss"]


def test_a_reason_is_short_and_printable() -> None:
    script = Script([(0, None), (1, hostile(kind="failure", reason="\x1b[2J\nboo" + "x" * 10_000))])
    _, record = step(strategy(), plan(), state(), script, nobody())
    reason = record["failures"][0]["reason"]
    assert reason.isprintable()
    assert "boo" in reason
    assert len(reason) <= 500
    _, record = step(strategy(), plan(), state(), Script([(0, None), (1, hostile(run="y" * 10_000))]), nobody())
    assert len(record["failures"][0]["reason"]) <= 500


@pytest.mark.parametrize(("quorum", "usable", "enough"), [(2, 1, False), (0, 1, False), (0, 2, True), (1, 1, True)])
def test_quorum(quorum: int, usable: int, enough: bool) -> None:
    script = Script([(p, None if p < usable else Failure("away")) for p in range(2)])
    if enough:
        assert step(strategy(), plan(quorum=quorum), state(), script, nobody())[0].round == 1
        return
    with pytest.raises(QuorumError, match=r"round 1: expected at least 2 usable updates, found 1 \(partition 1: away"):
        step(strategy(), plan(quorum=quorum), state(), script, nobody())


@pytest.mark.parametrize("script", [Script([], 0), Script([]), Script([(0, Failure("x")), (1, Failure("y"))])])
def test_no_usable_update_at_all_misses_every_quorum(script: Script) -> None:
    settled: list[object] = []
    observer = rounds.Observer(lambda *_: None, lambda *event: settled.append(event))
    with pytest.raises(QuorumError, match="round 1: expected at least 1 usable updates, found 0"):
        run(strategy(), plan(), state(), script, evaluate, observer)
    assert settled == []


def test_updates_that_overflow_the_adapter_end_the_run_in_words() -> None:
    huge = np.full(3, MOST_MAGNITUDE, "<f4").tobytes()
    script = Script([(0, hostile(0, huge))], 1)
    with pytest.raises(FedPeftError, match="adapter after round 1"):
        step(strategy(rate=1e25), plan(), state(), script, nobody())


def scores(*values: float) -> Callable[[object], dict[str, Any]]:
    left = iter(values)
    return lambda adapter: {"accuracy": next(left), "rows": 1, "groups": {}}


@pytest.mark.parametrize(
    ("values", "sign", "patience", "rounds_done", "stopped"),
    [
        ((0.1, 0.2, 0.3, 0.4, 0.5), 1, 2, 5, "completed"),
        ((0.5, 0.4, 0.5, 0.6, 0.7), 1, 2, 3, "early"),
        ((0.5, 0.4, 0.6, 0.5, 0.5), 1, 2, 5, "completed"),
        ((0.5, 0.4, 0.3, 0.2, 0.1), -1, 1, 5, "completed"),
        ((0.5, 0.6, 0.3, 0.2, 0.1), -1, 1, 2, "early"),
        ((0.5, 0.4, 0.3, 0.2, 0.1), 1, 0, 5, "completed"),
        ((math.nan, math.nan, 0.3, 0.2, 0.1), 1, 2, 2, "early"),
        ((math.nan, 0.2, math.nan, 0.3, 0.4), 1, 2, 5, "completed"),
    ],
)
def test_early_stopping(
    tmp_path: Path, values: tuple[float, ...], sign: int, patience: int, rounds_done: int, stopped: str
) -> None:
    made = plan(rounds=5, patience=patience, metric_sign=sign)
    final, why = run(strategy(), made, state(), transport(2, tmp_path), scores(*values), nobody())
    assert (final.round, why) == (rounds_done, stopped)


@pytest.mark.parametrize(("every", "expected"), [(1, [1, 2, 3, 4, 5]), (2, [2, 4, 5]), (3, [3, 5]), (0, [5])])
def test_the_server_scores_every_so_many_rounds_and_after_the_last(
    tmp_path: Path, every: int, expected: list[int]
) -> None:
    records: list[rounds.Record] = []
    observer = rounds.Observer(lambda *_: None, lambda record, _: records.append(record))
    run(strategy(), plan(rounds=5, evaluate_every=every), state(), transport(2, tmp_path), evaluate, observer)
    assert [record["round"] for record in records if record["evaluation"]] == expected


def answers(*found: tuple[int, dict[str, object]]) -> Script:
    packets = [
        (partition, Packet("evaluation", {**SESSION.manifest(3), "partition": partition, **manifest}))
        for partition, manifest in found
    ]
    return Script(packets, 4)  # type: ignore[arg-type]


def figures(accuracy: object, rows: object = 1) -> dict[str, object]:
    return {"metric.accuracy": accuracy, "metric.rows": rows}


def scored(script: Script, partitions: tuple[int, ...] = (0, 1)) -> rounds.Record | None:
    return evaluate_on_clients(strategy(), plan(), state(round_=3), script, dict.fromkeys(partitions, 1))


def test_clients_figures_are_weighed_by_their_rows() -> None:
    # (0.5 * 3 + 1.0 * 1) / 4
    found = scored(answers((1, figures(1.0)), (0, figures(0.5, 3))))
    assert found == {"accuracy": 0.625, "rows": 4, "groups": {}}


@pytest.mark.parametrize(
    "bad",
    [
        (1, {}),
        (1, {"metric.accuracy": 1.0}),
        (1, figures(1.0, 0)),
        (1, figures(1.0, -1)),
        (1, figures(1.0, 1e99)),
        (1, figures(1.0, 0.5)),
        (1, figures(1.0, True)),
        (1, figures(math.nan)),
        (1, figures("high")),
        (1, {**figures(1.0), "round": 2}),
        (1, {**figures(1.0), "partition": 0}),
        (1, {"metric.rows": 5}),
        (0, figures(1.0)),
        (3, figures(1.0)),
        (9, figures(1.0)),
    ],
)
@pytest.mark.parametrize("first", [False, True])
def test_a_bad_answer_does_not_count(bad: tuple[int, dict[str, object]], first: bool) -> None:
    good = (0, figures(0.5, 3))
    found = answers(bad, good) if first and bad[0] != 0 else answers(good, bad)
    assert scored(found) == {"accuracy": 0.5, "rows": 3, "groups": {}}


def test_where_no_client_answers_there_is_no_figure() -> None:
    assert scored(Script([(0, Failure("away")), (1, honest(1))])) is None
    assert scored(Script([])) is None


def test_clients_score_the_new_adapter_with_what_is_their_own(tmp_path: Path) -> None:
    records: list[rounds.Record] = []
    observer = rounds.Observer(lambda *_: None, lambda record, _: records.append(record))
    made, chosen = plan(rounds=1, evaluate_on_clients=True), strategy(keep_local(["head.*"]))
    run(chosen, made, state(), transport(2, tmp_path, chosen), evaluate, observer)
    # The heads went to 2 and 4 and stayed; the server's head is still 0.
    found = records[0]["client_evaluation"]
    assert (found["accuracy"], found["rows"], found["groups"]) == (3.0, 4, {})
    assert records[0]["evaluation"]["accuracy"] == 0.0


FEDEX = build(parts(merge=rule("examples", with_residual(0), whole=True, drifts=True), budget=3))
FFA = build(parts(frozen=("*.A",)))
RESUMED: dict[str, tuple[Strategy, dict[str, Any], ServerState]] = {
    "plain": (strategy(), {}, state()),
    "local": (strategy(keep_local(["head.*"])), {}, state()),
    "constant": (FFA, {"session": WIDE_SESSION, "ranks": ranks.listed((1, 4, 2))}, wide_state()),
    "drifting": (FEDEX, {"session": WIDE_SESSION, "ranks": ranks.listed((2, 4))}, wide_state()),
    "controls": (CONTROLLED, {"session": WIDE_SESSION}, CONTROLLED.init(RUN, 0, wide_state().adapter)),
}


@pytest.mark.parametrize("kind", sorted(RESUMED))
@pytest.mark.parametrize("cut", [1, 2, 3, 4])
def test_a_run_taken_up_again_ends_where_it_would_have(tmp_path: Path, cut: int, kind: str) -> None:
    chosen, changes, first = RESUMED[kind]
    whole, parted = tmp_path / "whole", tmp_path / "parts"
    expected = federate(whole, plan(rounds=5, **changes), 3, chosen, first)
    federate(parted, plan(rounds=cut, **changes), 3, chosen, first)
    final = federate(parted, plan(rounds=5, **changes), 3, chosen, first)
    for one, other in (
        (final.adapter.tensors, expected.adapter.tensors),
        (final.adapter.residual, expected.adapter.residual),
        (final.control, expected.control),
    ):
        assert bits(one) == bits(other)
    assert (final.drift, final.holdings) == (expected.drift, expected.holdings)
    timeless = [
        [{**record, "seconds": 0, "clients": 0} for record in journal.read(root / "journal.jsonl")]
        for root in (whole, parted)
    ]
    assert timeless[0] == timeless[1]
    for partition in range(3):
        memories = [FolderMemory(root / "memories").load("run-1", partition, 99) for root in (whole, parted)]
        assert memories[0].fields == memories[1].fields
        assert bits(memories[0].tensors) == bits(memories[1].tensors)


def test_early_stopping_is_remembered_across_a_stop(tmp_path: Path) -> None:
    made = plan(rounds=9, patience=2, metric_sign=-1)
    federate(tmp_path, replace(made, rounds=2))
    assert federate(tmp_path, made).round == 3
    assert federate(tmp_path, made).round == 3


def test_a_client_that_breaks_in_one_round_is_back_in_the_next(tmp_path: Path) -> None:
    def breaks(job: object) -> None:
        if job.round == 1:  # type: ignore[attr-defined]
            raise RuntimeError("once")

    learners = {0: Toy(0), 1: Toy(1, breaks=breaks)}
    local = transport(2, tmp_path)
    records: list[rounds.Record] = []
    observer = rounds.Observer(lambda *_: None, lambda record, _: records.append(record))
    mixed = replace(local, site_of=lambda partition: site(partition, learner=learners[partition]))
    final, _ = run(strategy(), plan(), state(), mixed, evaluate, observer)
    reason = "RuntimeError; the node's log says more"
    assert records[0]["failures"] == [{"partition": 1, "kind": "failed", "reason": reason}]
    assert records[1]["failures"] == []
    # Round 1: 2 of client 0 alone. Round 2: client 0 a third from 2 to 4, client 1 half from 2 to 8: 2 + (2/3 + 3) / 2.
    assert flat(final.adapter.tensors) == pytest.approx([2 + (2 / 3 + 3) / 2] * 3)


def test_an_update_as_long_as_the_bound_counts() -> None:
    script = Script([(0, None), (1, hostile(body=np.array([60, 0, 80], "<f4").tobytes()))])
    after, record = step(strategy(), plan(most_norm=100.0), state(), script, nobody())
    assert (after.round, record["failures"]) == (1, [])


@pytest.mark.parametrize("usable", [True, False])
def test_a_bad_update_counts_for_no_quorum(usable: bool) -> None:
    script = Script([(0, None), (1, None if usable else hostile(body=NAN))])
    if usable:
        assert step(strategy(), plan(quorum=2), state(), script, nobody())[0].round == 1
        return
    with pytest.raises(QuorumError, match=r"found 1 \(partition 1: .*NaN or infinity"):
        step(strategy(), plan(quorum=2), state(), script, nobody())


@pytest.mark.parametrize("rank", ["high", pytest.param(10**400, id="vast"), math.nan, math.inf, -3, True, None])
def test_what_is_said_of_a_rank_where_there_is_none_harms_nobody(rank: Any) -> None:
    spec = SPEC.only(["head.weight"])
    session, first = replace(SESSION, spec=spec.digest), state(0, 0, 0)
    first = replace(first, adapter=AdapterState(spec, {"head.weight": np.zeros(1, np.float32)}))
    bad, good = (
        handle(fit_request(strategy(), first, session, p), Memory(), site(p, learner=Toy(p, spec=spec)))[0]
        for p in (0, 1)
    )
    said = {key: value for key, value in {**bad.manifest, "rank": rank}.items() if value is not None}
    script = Script([(0, Packet("update", said, bad.body)), (1, good)])
    after, record = step(strategy(), plan(session=session), first, script, nobody())
    assert after.round == 1
    assert 1 in [client["partition"] for client in record["clients"]]
    assert record["clients"][-1]["rank"] == 0
    json.dumps(record)


@pytest.mark.parametrize("name", ["fedavg", "flexlora", "flora", "fedex", "hetlora", "median", "geometric_median"])
@pytest.mark.parametrize("size", [1e19, 3e38])
def test_numbers_as_great_as_float32_holds_end_in_words_or_not_at_all(name: str, size: float) -> None:
    chosen = build(replace(parts(), method=MERGES.members[name]().build()))
    first = wide_state()
    packets = []
    for partition in range(2):
        request = fit_request(chosen, first, WIDE_SESSION, partition)
        reply = handle(request, Memory(), site(partition, chosen, Toy(partition, spec=WIDE)))[0]
        packets.append((partition, Packet("update", reply.manifest, np.full(WIDE.parameters, size, "<f4").tobytes())))
    with contextlib.suppress(FedPeftError):
        step(chosen, plan(session=WIDE_SESSION), first, Script(packets), nobody())  # type: ignore[arg-type]


# Nodes of unlike rank.


@dataclass
class Nodes:
    """Sites of this process that say ranks and memory of their own, which may be others each round.

    `said[round][partition]` are the arguments of `site`; the last entry holds for all rounds after it. `asked` are
    the packets that went down, by round.
    """

    plan: Strategy
    root: Path
    said: list[dict[int, dict[str, Any]]] = field(default_factory=lambda: [{}])
    clients: int = 2
    asked: list[tuple[int, Packet]] = field(default_factory=list)
    toys: dict[int, Toy] = field(default_factory=dict)
    replaced: dict[tuple[str, int], Packet | Failure] = field(default_factory=dict)

    def partitions(self) -> tuple[int, ...]:
        return tuple(range(self.clients))

    def exchange(
        self, requests: Mapping[int, Packet], timeout_seconds: float
    ) -> Iterator[tuple[int, Packet | Failure]]:
        for partition, packet in requests.items():
            self.asked.append((partition, packet))
            round_ = int(packet.manifest["round"])
            more = self.said[min(round_, len(self.said)) - 1].get(partition, {})
            toy = self.toys.setdefault(partition, Toy(partition, spec=WIDE))
            found = site(partition, self.plan, toy, **more)
            reply = answer(packet, found, FolderMemory(self.root))
            yield partition, self.replaced.get((packet.kind, partition), reply)

    def kinds(self) -> list[str]:
        return [packet.kind for _, packet in self.asked]

    def fits(self, partition: int) -> list[Packet]:
        return [packet for to, packet in self.asked if (to, packet.kind) == (partition, "fit")]


def wide_plan(rule_: RankRule, **changes: Any) -> rounds.Plan:
    return plan(session=WIDE_SESSION, ranks=rule_, **changes)


def went(
    nodes: Nodes, made: rounds.Plan, rounds_: int, first: ServerState | None = None
) -> tuple[list[ServerState], list[rounds.Record]]:
    """States before and after each round, and the rounds' records."""
    states, records = [first or wide_state()], []
    for _ in range(rounds_):
        after, record = step(nodes.plan, made, states[-1], nodes, nobody())
        states.append(after)
        records.append(record)
    return states, records


def test_nodes_train_at_the_ranks_of_a_list(tmp_path: Path) -> None:
    nodes = Nodes(strategy(), tmp_path, clients=3)
    states, records = went(nodes, wide_plan(ranks.listed((1, 3)), cohort=3), 2)
    assert nodes.kinds() == ["fit"] * 6
    for record in records:
        assert [client["rank"] for client in record["clients"]] == [1, 3, 1]
    for partition, rank in enumerate((1, 3, 1)):
        for held, seen in zip(states, nodes.toys[partition].seen, strict=False):
            own = at_rank(WIDE, rank)
            assert seen.spec == own
            assert bits(seen.tensors) == bits(resized(held.adapter.tensors, own))
    down = [client["bytes_down"] for client in records[0]["clients"]]
    assert down[1] - down[0] == 2 * 26 * 4
    assert records[0]["bytes_down"] == sum(down)


def test_a_node_may_say_another_rank_before_each_round(tmp_path: Path) -> None:
    said = [{0: {"rank": 1}, 1: {"rank": 4}}, {0: {"rank": 3}}, {0: {"rank": 2}, 1: {"rank": 1}}]
    nodes = Nodes(FFA, tmp_path, said)
    states, records = went(nodes, wide_plan(ranks.declared(4)), 3)
    assert nodes.kinds() == ["describe", "describe", "fit", "fit"] * 3
    assert [[client["rank"] for client in record["clients"]] for record in records] == [[1, 4], [3, 4], [2, 1]]
    assert all(record["failures"] == [] for record in records)
    for at, ranks_ in enumerate([(1, 4), (3, 4), (2, 1)]):
        for partition, rank in enumerate(ranks_):
            own = at_rank(WIDE, rank)
            seen = nodes.toys[partition].seen[at]
            assert bits(seen.tensors) == bits(resized(states[at].adapter.tensors, own))
    # A goes down at first and where the rank has grown: 1 + 26 r numbers with it, 1 + 10 r without.
    sizes = [[len(packet.body) // 4 for packet in nodes.fits(partition)] for partition in (0, 1)]
    assert sizes == [[27, 79, 21], [105, 41, 11]]
    assert states[3].holdings == {0: Holding(2, 3), 1: Holding(2, 4)}


def test_what_is_said_of_a_rank_counts_among_the_bytes_each_way(tmp_path: Path) -> None:
    """Ten bytes of a manifest or a thousand: what is asked and answered before a round is sent too."""
    told, equal = (
        went(Nodes(strategy(), tmp_path / name), wide_plan(rule_), 1)[1][0]
        for name, rule_ in (("told", ranks.declared(4)), ("equal", ranks.equal()))
    )
    nodes = Nodes(strategy(), tmp_path / "again")
    went(nodes, wide_plan(ranks.declared(4)), 1)
    asked = [(partition, packet) for partition, packet in nodes.asked if packet.kind == "describe"]
    said = [answer(packet, site(p, strategy(), Toy(p, spec=WIDE)), FolderMemory(tmp_path)) for p, packet in asked]
    assert (told["exchanges"], equal["exchanges"]) == (2, 1)
    assert told["bytes_down"] - equal["bytes_down"] == sum(packet.size_bytes for _, packet in asked) > 0
    assert told["bytes_up"] - equal["bytes_up"] == sum(reply.size_bytes for reply in said) > 0
    assert told["bytes_up"] == sum(client["bytes_up"] for client in told["clients"])


def test_a_silent_site_takes_part_with_a_zero_and_says_it_all_later(tmp_path: Path) -> None:
    """Each site walks half, a third, a quarter ... of its way, so that its second update is shorter than its first."""
    quiet, records = strategy(keep_silent(1.0, 1)), []
    after, network = state(), transport(2, tmp_path, quiet)
    for _ in range(2):
        before, (after, record) = after, step(quiet, plan(), after, network, nobody())
        records.append(record)
    silent = [[bool(client.get("silent")) for client in record["clients"]] for record in records]
    # From 0 the sites walk to 2 and 4, the mean is 3; from there a third of 1 and of 5: -> 1/3 and 5/3, both below.
    assert silent == [[False, False], [True, True]]
    assert flat(after.adapter.tensors) == flat(before.adapter.tensors) == [3, 3, 3]
    # Of each site three numbers less, and that it is silent: a name and a number.
    assert records[1]["bytes_up"] - records[0]["bytes_up"] == 2 * (len("metric.silent") + 8 - 12)
    after, record = step(quiet, plan(), after, network, nobody())
    # A quarter of the same way from 3, and what was kept back: (1 + 5) / 2 * (1/3 + 1/4) = 7/4.
    assert flat(after.adapter.tensors) == pytest.approx([4.75, 4.75, 4.75])


def test_bytes_of_an_answer_that_is_refused_are_counted_although_it_is_not_used() -> None:
    reply = hostile(1, NAN)
    _, plain = step(strategy(), plan(quorum=1), state(), Script([(0, None)]), nobody())
    _, record = step(strategy(), plan(quorum=1), state(), Script([(0, None), (1, reply)]), nobody())
    assert [client["partition"] for client in record["clients"]] == [0]
    assert record["bytes_up"] - plain["bytes_up"] == reply.size_bytes > 0


def test_memory_decides_the_rank_and_a_wish_may_lower_it(tmp_path: Path) -> None:
    said = [{0: {"memory_bytes": 2 * 10**9}, 1: {"memory_bytes": 9 * 10**9, "rank": 3}}, {1: {"memory_bytes": 10**12}}]
    nodes = Nodes(strategy(), tmp_path, said)
    _, records = went(nodes, wide_plan(ranks.by_memory((1, 2, 4), (1.0, 2.0, 8.0))), 2)
    assert [[client["rank"] for client in record["clients"]] for record in records] == [[2, 3], [1, 4]]


def test_the_mean_over_nodes_of_unlike_rank_by_hand(tmp_path: Path) -> None:
    """Client 0 walks half way to 4 in its leading rows, client 1 half way to 8 in all of them."""
    nodes = Nodes(build(parts(merge=rule("examples", missing="covered"))), tmp_path)
    states, _ = went(nodes, wide_plan(ranks.listed((1, 4))), 1)
    for key, value in counted().items():
        after = states[1].adapter.tensors[key]
        shared = tuple(slice(size) for size in at_rank(WIDE, 1).shapes[key])
        expected = value + (8 - value) / 2
        expected[shared] = value[shared] + ((4 - value[shared]) / 2 + (8 - value[shared]) / 2) / 2
        np.testing.assert_allclose(after, expected, rtol=1e-6)


DESCRIPTION = Packet("description", {**WIDE_SESSION.manifest(1), "partition": 1, "rank": 2, "memory_bytes": 0})


def described(kind: str = "description", **changes: Any) -> Packet:
    manifest = {**DESCRIPTION.manifest, **changes}
    return Packet(kind, {key: value for key, value in manifest.items() if value is not None})


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (Failure("node gone"), "node gone"),
        (described("failure", reason="disk on fire"), "disk on fire"),
        (described("failure"), "the node gave no reason"),
        (described("failure", reason="\x1b[2J" + "x" * 10_000), "xxx"),
        (described("update"), "field kind"),
        (described(round=2), "field round"),
        (described(partition=0), "field partition"),
        (described(partition=True), "field partition"),
        (described(run="other"), "field run"),
        (described(spec="x"), "field spec"),
        (described(config="x"), "field config"),
        (described(version=None), "field version"),
        (described(rank=5), "description of partition 1, rank: expected at most 4, found 5"),
        (described(rank=10**18), "rank: expected at most 4"),
    ],
)
def test_a_description_that_is_of_no_use_is_a_failure_on_record_and_the_round_goes_on(
    tmp_path: Path, reply: Packet | Failure, reason: str
) -> None:
    told: list[tuple[int, int, bool]] = []
    nodes = Nodes(strategy(), tmp_path, [{0: {"rank": 2}, 1: {"rank": 2}}], replaced={("describe", 1): reply})
    observer = rounds.Observer(lambda *event: told.append(event), lambda *_: None)
    after, record = step(strategy(), wide_plan(ranks.declared(4)), wide_state(), nodes, observer)
    assert [client["partition"] for client in record["clients"]] == [0]
    assert [failure["partition"] for failure in record["failures"]] == [1]
    assert reason in record["failures"][0]["reason"]
    assert record["failures"][0]["reason"].isprintable()
    assert len(record["failures"][0]["reason"]) <= 500
    assert record["cohort"] == [0, 1]
    assert [partition for partition, packet in nodes.asked if packet.kind == "fit"] == [0]
    assert told == [(1, 1, False), (1, 0, True)]
    assert (after.round, after.holdings) == (1, {0: Holding(0, 2)})


@pytest.mark.parametrize("rank", [0, -1, True, 2.0, "2", None, 10**18, pytest.param(10**400, id="vast"), math.nan])
@pytest.mark.parametrize("kind", ["declared", "by_memory"])
def test_whatever_a_description_says_ends_no_round(tmp_path: Path, kind: str, rank: object) -> None:
    rule_ = {"declared": ranks.declared(3), "by_memory": ranks.by_memory((3, 4), (0.0, 8.0))}[kind]
    replaced: dict[tuple[str, int], Packet | Failure] = {("describe", 1): described(rank=rank, memory_bytes=rank)}
    nodes = Nodes(strategy(), tmp_path, [{0: {"rank": 2}}], replaced=replaced)
    after, record = step(strategy(), wide_plan(rule_), wide_state(), nodes, nobody())
    assert after.round == 1
    assert 0 in [client["partition"] for client in record["clients"]]


def test_where_no_description_is_of_use_the_quorum_is_missed(tmp_path: Path) -> None:
    nodes = Nodes(strategy(), tmp_path, [{0: {"rank": 9}, 1: {"rank": 8}}])
    with pytest.raises(QuorumError, match=r"found 0 \(partition 0: .* at most 4, found 9.*partition 1: .* found 8"):
        step(strategy(), wide_plan(ranks.declared(4)), wide_state(), nodes, nobody())
    assert nodes.kinds() == ["describe"] * 2


def test_a_node_that_answers_at_another_rank_than_it_was_asked_for_ends_no_round(tmp_path: Path) -> None:
    for name in ("fedavg", "median", "flexlora", "krum"):
        chosen = build(replace(parts(), method=MERGES.members[name]().build()))
        small = Nodes(chosen, tmp_path / f"{name}-small", clients=6)
        went(small, wide_plan(ranks.listed((1,)), cohort=6), 1)
        reply = answer(small.fits(5)[0], site(5, chosen, Toy(5, spec=WIDE)), FolderMemory(tmp_path / name))
        nodes = Nodes(chosen, tmp_path / f"{name}-other", clients=6, replaced={("fit", 5): reply})
        after, record = step(chosen, wide_plan(ranks.listed((4,)), cohort=6), wide_state(), nodes, nobody())
        assert after.round == 1
        assert [client["partition"] for client in record["clients"]][:5] == [0, 1, 2, 3, 4]
        WIDE.require(after.adapter.tensors, name)


def test_an_update_above_the_rank_that_was_asked_for_is_refused(tmp_path: Path) -> None:
    whole = Nodes(strategy(), tmp_path / "whole")
    went(whole, wide_plan(ranks.listed((4,))), 1)
    reply = answer(whole.fits(1)[0], site(1, learner=Toy(1, spec=WIDE)), FolderMemory(tmp_path / "other"))
    nodes = Nodes(strategy(), tmp_path / "small", replaced={("fit", 1): reply})
    after, record = step(strategy(), wide_plan(ranks.listed((2,))), wide_state(), nodes, nobody())
    assert [client["partition"] for client in record["clients"]] == [0]
    assert re.search(r"partition 1, rank: expected an integer from \d to 2, found 4", record["failures"][0]["reason"])
    assert after.holdings == {0: Holding(0, 2)}


# Who is known to have what.


def drifting_nodes(tmp_path: Path, clients: int = 3) -> tuple[Nodes, rounds.Plan]:
    chosen = build(parts(merge=rule("examples", with_residual(1), whole=True, drifts=True)))
    return Nodes(chosen, tmp_path, clients=clients), wide_plan(ranks.listed((1, 4)), cohort=clients)


def test_who_answers_is_known_to_have_what_it_was_sent_and_nobody_else_is(tmp_path: Path) -> None:
    nodes, made = drifting_nodes(tmp_path)
    held = wide_state()
    held, _ = step(nodes.plan, made, held, nodes, nobody())
    assert held.holdings == {0: Holding(0, 1), 1: Holding(0, 4), 2: Holding(0, 1)}
    nodes.replaced = {("fit", 1): Failure("away")}
    held, _ = step(nodes.plan, made, held, nodes, nobody())
    assert held.holdings == {0: Holding(1, 1), 2: Holding(1, 1)}
    nodes.replaced, nodes.clients = {}, 1
    held, _ = step(nodes.plan, made, held, nodes, nobody())
    assert held.holdings == {0: Holding(2, 1), 2: Holding(1, 1)}
    # Ranks are remembered for as long as somebody is at that round.
    assert sorted(held.drift.ranks) == [1, 2, 3]
    held, _ = step(nodes.plan, made, held, nodes, nobody())
    assert sorted(held.drift.ranks) == [1, 3, 4]


def test_new_columns_alone_go_down_to_who_answered_and_all_to_who_did_not(tmp_path: Path) -> None:
    nodes, made = drifting_nodes(tmp_path)
    nodes.clients = 2
    states, _ = went(nodes, made, 2)
    nodes.replaced = {("fit", 1): Failure("away")}
    states += went(nodes, made, 1, states[-1])[0][1:]
    nodes.replaced, nodes.clients = {}, 3
    went(nodes, made, 1, states[-1])
    ranges = [
        [(packet.manifest.get("residual.from"), packet.manifest.get("residual.to")) for packet in nodes.fits(partition)]
        for partition in (0, 1, 2)
    ]
    assert ranges == [
        [(None, None), ("0,0", "1,1"), ("1,1", "2,2"), ("2,2", "3,3")],
        [(None, None), ("0,0", "1,1"), ("1,1", "2,2"), ("0,0", "3,3")],
        [("0,0", "3,3")],
    ]
    for partition in (0, 1, 2):
        seen = nodes.toys[partition].seen[-1]
        assert bits(seen.residual) == bits(states[3].adapter.residual)


@pytest.mark.parametrize("kind", ["drifting", "constant"])
def test_a_node_that_lost_its_memory_fails_once_and_is_sent_everything_the_next_time(tmp_path: Path, kind: str) -> None:
    nodes, made = drifting_nodes(tmp_path)
    nodes = nodes if kind == "drifting" else replace(nodes, plan=FFA)
    made = replace(made, asking=replace(made.asking, cohort=2))
    nodes.clients = 2
    states, _ = went(nodes, made, 2)
    shutil.rmtree(tmp_path / RUN / "partition-0")
    after, records = went(nodes, made, 2, states[-1])
    assert [[failure["partition"] for failure in record["failures"]] for record in records] == [[0], []]
    assert "in this node's memory, found none" in records[0]["failures"][0]["reason"]
    last = nodes.fits(0)[-1]
    assert (last.manifest["known"], last.manifest.get("residual.from")) == (
        False,
        "0,0" if kind == "drifting" else None,
    )
    seen, held = nodes.toys[0].seen[-1], after[1]
    assert bits(seen.residual) == bits(held.adapter.residual)
    assert bits(seen.tensors) == bits(resized(held.adapter.tensors, at_rank(WIDE, 1)))


def test_a_node_whose_update_was_refused_is_sent_everything(tmp_path: Path) -> None:
    nodes, made = drifting_nodes(tmp_path, 2)
    states, _ = went(nodes, made, 1)
    nodes.replaced = {("fit", 1): Packet("update", {})}
    states += went(nodes, made, 1, states[-1])[0][1:]
    nodes.replaced = {}
    went(nodes, made, 1, states[-1])
    assert [packet.manifest["known"] for packet in nodes.fits(1)] == [False, True, False]


def test_clients_score_at_the_rank_that_they_answered_at(tmp_path: Path) -> None:
    nodes = Nodes(FFA, tmp_path)
    made = wide_plan(ranks.listed((1, 3)), rounds=2, evaluate_on_clients=True)
    final, _ = run(FFA, made, wide_state(), nodes, evaluate, nobody())
    asked = [(partition, packet) for partition, packet in nodes.asked if packet.kind == "evaluate"]
    assert [(partition, packet.manifest["rank"], packet.manifest["known"]) for partition, packet in asked] == [
        (0, 1, True),
        (1, 3, True),
    ] * 2
    for partition, rank in ((0, 1), (1, 3)):
        seen = nodes.toys[partition].seen[-1]
        assert bits(seen.tensors) == bits(resized(final.adapter.tensors, at_rank(WIDE, rank)))


@pytest.mark.parametrize("name", ["rank", "residual_rank"])
def test_no_metric_stands_in_for_a_rank(name: str) -> None:
    reply = hostile(0, **{f"metric.{name}": 77.0})
    _, record = step(strategy(), plan(cohort=1), state(), Script([(0, reply)], 1), nobody())
    assert record["clients"][0]["rank"] == 1
    assert "residual_rank" not in record


def test_what_the_journal_says_of_the_merge(tmp_path: Path) -> None:
    nodes, made = drifting_nodes(tmp_path)
    _, records = went(nodes, made, 2)
    for at, record in enumerate(records):
        assert record["residual_rank"] == at + 1
        assert record["residual_dropped"] == 0.0
        assert (
            set(record["merge_errors"]) == set(record["effective_ranks"]) == set(record["tails"]) == {"left", "right"}
        )
        assert 0 <= record["merge_error"] < 1
        assert 0 <= record["tail"] < 1
        journal.append(tmp_path / "journal.jsonl", record)
    assert journal.read(tmp_path / "journal.jsonl")[1]["residual_rank"] == 2.0
