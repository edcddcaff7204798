import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpeft import journal, rounds
from fedpeft.errors import FedPeftError, QuorumError
from fedpeft.memory import FolderMemory
from fedpeft.rounds import cohort_of, evaluate_on_clients, in_order, run, step
from fedpeft.stages import keep_local
from fedpeft.wire import Failure, Packet
from tests.toys import (
    SESSION,
    Script,
    Toy,
    evaluate,
    federate,
    flat,
    honest,
    nobody,
    plan,
    site,
    state,
    strategy,
    transport,
)


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
    after, record = step(strategy(), plan(), state(), Script([(1, reply), (0, None)]), observer)
    assert flat(after.adapter.tensors) == [2, 2, 2]
    assert [client["partition"] for client in record["clients"]] == [0]
    assert [failure["partition"] for failure in record["failures"]] == [1]
    assert reason in record["failures"][0]["reason"]
    assert told == [(1, 0, True), (1, 1, False)]


def test_a_partition_that_never_answers_is_a_failure() -> None:
    _, record = step(strategy(), plan(), state(), Script([(0, None)]), nobody())
    assert record["failures"] == [{"partition": 1, "reason": "no answer within the deadline"}]


def test_what_was_not_asked_or_comes_twice_is_passed_over() -> None:
    script = Script([(7, honest(7)), (0, None), (0, hostile(0, NAN)), (0, None), (1, None), (-1, honest(1))])
    after, record = step(strategy(), plan(), state(), script, nobody())
    assert flat(after.adapter.tensors) == [3, 3, 3]
    assert [client["partition"] for client in record["clients"]] == [0, 1]
    assert record["failures"] == []


@pytest.mark.parametrize("key", ["examples", "tokens", "partition", "bytes_up", "bytes_down"])
@pytest.mark.parametrize("value", [0.0, -2.0, 1e300])
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
    huge = np.full(3, np.finfo(np.float32).max, "<f4").tobytes()
    script = Script([(0, hostile(0, huge))], 1)
    with pytest.raises(FedPeftError, match="adapter after round 1"):
        step(strategy(), plan(), state(1e38, 0, 0), script, nobody())


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
    return evaluate_on_clients(strategy(), plan(), state(round_=3), script, partitions)


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
        (1, figures(1.0, 1e300)),
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


@pytest.mark.parametrize("local", [False, True])
@pytest.mark.parametrize("cut", [1, 2, 3, 4])
def test_a_run_taken_up_again_ends_where_it_would_have(tmp_path: Path, cut: int, local: bool) -> None:
    chosen = strategy(keep_local(["head.*"])) if local else strategy()
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    expected = federate(whole, plan(rounds=5), plan=chosen)
    federate(parts, plan(rounds=cut), plan=chosen)
    final = federate(parts, plan(rounds=5), plan=chosen)
    assert flat(final.adapter.tensors) == flat(expected.adapter.tensors)
    timeless = [
        [{**record, "seconds": 0, "clients": 0} for record in journal.read(root / "journal.jsonl")]
        for root in (whole, parts)
    ]
    assert timeless[0] == timeless[1]
    for partition in range(3):
        memories = [FolderMemory(root / "memories").load("run-1", partition, 99) for root in (whole, parts)]
        assert memories[0].fields == memories[1].fields
        assert flat(memories[0].tensors) == flat(memories[1].tensors)


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
    assert records[0]["failures"] == [{"partition": 1, "reason": "RuntimeError: once"}]
    assert records[1]["failures"] == []
    # Round 1: 2 of client 0 alone. Round 2: client 0 a third from 2 to 4, client 1 half from 2 to 8: 2 + (2/3 + 3) / 2.
    assert flat(final.adapter.tensors) == pytest.approx([2 + (2 / 3 + 3) / 2] * 3)
