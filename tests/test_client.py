import math
from dataclasses import replace

import numpy as np
import pytest

from fedpeft.adapters import AdapterSpec, AdapterState, at_rank, resized
from fedpeft.client import FitJob, Fitted, handle
from fedpeft.errors import DataError
from fedpeft.merges import Pruning
from fedpeft.requests import describe_request, evaluate_request, fit_request
from fedpeft.stages import Stage, alternate, chain, clip, freeze, keep_local
from fedpeft.strategy import build
from fedpeft.updates import Memory, Update
from fedpeft.wire import Packet, read_update
from tests.toys import (
    CONFIG,
    SESSION,
    SPEC,
    WIDE,
    WIDE_SESSION,
    Toy,
    counted,
    flat,
    numbers,
    parts,
    site,
    state,
    strategy,
    wide_state,
)

REQUEST = fit_request(strategy(), state(0, 0, 0), SESSION, 0)


def changed(packet: Packet, **changes: object) -> Packet:
    manifest = {key: value for key, value in {**packet.manifest, **changes}.items() if value is not None}
    return Packet(packet.kind, manifest, packet.body)  # type: ignore[arg-type]


def test_a_fit_sends_what_it_learned_and_remembers_its_position() -> None:
    # Half of the way from 0 to 8: delta 4 in each of three tensors.
    reply, memory = handle(REQUEST, Memory({}, {"other": "kept"}), site(1))
    update = read_update(reply, strategy(), SPEC, {**SESSION.manifest(1), "partition": 1})
    assert flat(update.delta) == [4, 4, 4]
    assert (update.examples, update.tokens) == (2, 20)
    assert update.metrics == {"loss": 1.0, "learning_rate": 0.5, "update_norm": pytest.approx(math.sqrt(48))}
    assert memory == Memory({}, {"other": "kept", "position": 1})


def test_position_decides_where_training_goes_on() -> None:
    # A third of the way from 0 to 12.
    reply, memory = handle(REQUEST, Memory({}, {"position": 1}), site(2))
    update = read_update(reply, strategy(), SPEC, {**SESSION.manifest(1), "partition": 2})
    assert flat(update.delta) == [4, 4, 4]
    assert memory.fields == {"position": 2}


def test_frozen_tensors_are_neither_trained_nor_sent() -> None:
    plan = strategy(freeze(["layer.A"]))
    reply, _ = handle(REQUEST, Memory(), site(0, plan))
    update = read_update(reply, plan, SPEC, {**SESSION.manifest(1), "partition": 0})
    assert update.delta.keys() == {"head.weight", "layer.B"}


def test_local_tensors_stay_in_memory_and_are_taken_up_again() -> None:
    plan, learner = strategy(keep_local(["head.*"])), Toy(0)
    reply, memory = handle(REQUEST, Memory(), site(0, plan, learner))
    assert len(reply.body) == 8
    assert flat(memory.tensors) == [2.0]
    _, memory = handle(REQUEST, memory, site(0, plan, learner))
    assert flat(learner.seen[-1].tensors) == [2, 0, 0]
    assert flat(memory.tensors) == pytest.approx([2 + 2 / 3])


def test_an_evaluation_uses_personal_tensors_and_changes_no_memory() -> None:
    plan, learner = strategy(keep_local(["head.*"])), Toy(0)
    memory = Memory({"head.weight": np.array([7], np.float32)}, {"position": 4})
    request = evaluate_request(plan, state(1, 2, 3), SESSION, 0)
    reply, after = handle(request, memory, site(0, plan, learner))
    assert (reply.kind, reply.manifest["metric.accuracy"], reply.manifest["metric.rows"]) == ("evaluation", 7.0, 2.0)
    assert flat(learner.seen[-1].tensors) == [7, 2, 3]
    assert after is memory
    plain, _ = handle(request, memory, site(0, strategy(), learner))
    assert plain.manifest["metric.accuracy"] == 1.0


@pytest.mark.parametrize("kept", [freeze(["head.*"]), keep_local(["head.*"]), alternate(["head.*"], ["*.A"])])
def test_the_norm_that_is_reported_is_the_norm_that_is_sent(kept: Stage) -> None:
    plan = strategy(chain(kept, clip(1.0)))
    reply, _ = handle(REQUEST, Memory(), site(0, plan))
    assert reply.manifest["metric.update_norm"] == pytest.approx(1.0)
    assert reply.manifest["metric.clipped"] == 1.0
    delta = read_update(reply, plan, SPEC, {**SESSION.manifest(1), "partition": 0}).delta
    assert flat(delta) == pytest.approx([math.sqrt(0.5)] * 2)


def test_only_what_is_left_to_share_is_clipped() -> None:
    # (2, 2, 2) without the head and without A is (2): shorter than 3, and than ‖(2, 2, 2)‖.
    plan = strategy(chain(freeze(["head.*"]), keep_local(["*.A"]), clip(3.0)))
    reply, memory = handle(REQUEST, Memory(), site(0, plan))
    assert "metric.clipped" not in reply.manifest
    assert flat(read_update(reply, plan, SPEC, {**SESSION.manifest(1), "partition": 0}).delta) == [2.0]
    assert flat({"A": memory.tensors["layer.A"]}) == [2.0]


def raising(error: Exception, spec: AdapterSpec = SPEC) -> Toy:
    def breaks(job: FitJob) -> None:
        raise error

    return Toy(0, breaks=breaks, spec=spec)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (DataError("rows: expected some, found none; give some."), "rows: expected some, found none; give some."),
        (RuntimeError("a row of the site"), "RuntimeError; the node's log says more"),
        (KeyError("x"), "KeyError; the node's log says more"),
    ],
)
def test_what_goes_wrong_is_told_and_memory_stays(error: Exception, reason: str) -> None:
    memory = Memory(numbers(1, 2, 3), {"position": 5})
    reply, after = handle(REQUEST, memory, site(0, learner=raising(error)))
    assert (reply.kind, reply.manifest["reason"], reply.body) == ("failure", reason, b"")
    assert (reply.manifest["partition"], reply.manifest["round"]) == (0, 1)
    assert after is memory
    assert flat(after.tensors) == [1, 2, 3]


@pytest.mark.parametrize(
    ("field", "value"),
    [("config", "other"), ("config", None), ("spec", "other"), ("spec", None), ("version", "9.9"), ("version", None)],
)
@pytest.mark.parametrize("kind", ["fit", "evaluate", "describe"])
def test_a_request_from_other_settings_or_another_version_is_refused(kind: str, field: str, value: object) -> None:
    request = changed(Packet(kind, REQUEST.manifest, REQUEST.body), **{field: value})
    learner = Toy(0)
    reply, after = handle(request, (memory := Memory({}, {"position": 1})), site(0, learner=learner))
    assert reply.kind == "failure"
    assert f"field {field}: expected" in str(reply.manifest["reason"])
    assert (after, learner.seen) == (memory, [])


@pytest.mark.parametrize("round_", [None, "soon", float("nan")])
def test_a_request_without_a_round_is_a_failure(round_: object) -> None:
    memory = Memory()
    reply, after = handle(changed(REQUEST, round=round_), memory, site(0))
    assert reply.kind == "failure"
    assert after is memory


def test_an_unknown_kind_is_a_failure() -> None:
    reply, _ = handle(Packet("delete", REQUEST.manifest), Memory(), site(0))
    assert "expected one of fit, evaluate, describe, secure, found 'delete'" in str(reply.manifest["reason"])


def test_the_config_of_the_site_is_what_counts() -> None:
    assert handle(REQUEST, Memory(), site(0, config=CONFIG))[0].kind == "update"
    assert handle(REQUEST, Memory(), site(0, config="mine"))[0].kind == "failure"


class Rounding(Toy):
    """Holds what it is given to a hundredth, as a model does that divides a scale out; learns nothing."""

    def fit(self, adapter: AdapterState, job: FitJob) -> Fitted:
        held = {key: np.round(value, 2) for key, value in adapter.tensors.items()}
        return Fitted(held, held, 1, 1, job.position + 1, {"loss": 1.0})


def test_a_delta_is_from_what_the_model_held_not_from_what_was_sent() -> None:
    request = fit_request(strategy(), state(1 / 3, 2 / 3, 1 / 7), SESSION, 0)
    reply, _ = handle(request, Memory(), site(0, learner=Rounding(0)))
    assert reply.body == bytes(12)


class Diverging(Toy):
    """Comes back with numbers that are not finite in every tensor."""

    def fit(self, adapter: AdapterState, job: FitJob) -> Fitted:
        after = {key: value + np.float32(np.nan) for key, value in adapter.tensors.items()}
        return Fitted(adapter.tensors, after, 1, 1, job.position + 1, {"loss": 1.0})


@pytest.mark.parametrize("stage", [None, keep_local(["head.*"]), keep_local(["layer.*"])])
def test_a_client_that_diverges_says_so_and_forgets_it(stage: object) -> None:
    memory = Memory(numbers(1, 2, 3), {"position": 5})
    plan = strategy(stage)  # type: ignore[arg-type]
    reply, after = handle(REQUEST, memory, site(0, plan, Diverging(0)))
    assert reply.kind == "failure"
    assert "NaN or infinity" in str(reply.manifest["reason"])
    assert after is memory


# At its own rank.


def fit(
    plan: object = None, rank: int = 0, memory: Memory | None = None, **changes: object
) -> tuple[Packet, Memory, Toy]:
    """A client of partition 0 that is sent the wide adapter of `wide_state(**changes)`."""
    chosen, toy = plan or strategy(), Toy(0, spec=WIDE)
    request = fit_request(chosen, wide_state(**changes), WIDE_SESSION, 0, rank)  # type: ignore[arg-type]
    reply, kept = handle(request, memory or Memory(), site(0, chosen, toy))  # type: ignore[arg-type]
    return reply, kept, toy


def learned(reply: Packet, plan: object = None, rank: int = 4, round_: int = 1) -> Update:
    expected = {**WIDE_SESSION.manifest(round_), "partition": 0}
    return read_update(reply, plan or strategy(), at_rank(WIDE, rank), expected)  # type: ignore[arg-type]


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_a_client_trains_and_answers_at_the_rank_that_it_is_sent(rank: int) -> None:
    reply, memory, toy = fit(rank=rank)
    own = at_rank(WIDE, rank)
    assert reply.manifest["rank"] == rank
    assert toy.seen[0].spec == own
    update = learned(reply, rank=rank)
    for key, value in resized(counted(), own).items():
        np.testing.assert_allclose(update.delta[key], (4 - value) / 2, rtol=1e-6)
    assert memory.fields == {"position": 1}


@pytest.mark.parametrize(("round_", "frozen"), [(1, "*.A"), (2, "*.B"), (3, "*.A")])
def test_each_round_has_its_own_frozen_tensors(round_: int, frozen: str) -> None:
    plan = strategy(alternate(["*.A"], ["*.B"]))
    reply, _, toy = fit(plan, round_=round_ - 1)
    assert toy.jobs[0].frozen == WIDE.matching([frozen])
    assert learned(reply, plan, round_=round_).delta.keys() == WIDE.without([frozen]).shapes.keys()


def test_what_was_sent_once_is_remembered_when_the_fit_went_well_and_only_then() -> None:
    plan = strategy(freeze(["*.A"]))
    _, memory, _ = fit(plan)
    assert sorted(memory.tensors) == ["constant/left.A", "constant/right.A"]
    request = fit_request(plan, wide_state(), WIDE_SESSION, 0)
    before = Memory({}, {"position": 3})
    reply, after = handle(request, before, site(0, plan, raising(RuntimeError("no"), WIDE)))
    assert (reply.kind, after) == ("failure", before)


def test_a_residual_is_trained_on_and_remembered() -> None:
    residual = {key: np.ones(shape, np.float32) for key, shape in at_rank(WIDE, 2).without(["head.*"]).shapes.items()}
    _, memory, toy = fit(residual=residual)
    assert flat(toy.seen[0].residual) == flat(residual)
    assert set(memory.tensors) == {f"residual/{key}" for key in residual}
    assert memory.fields == {"position": 1, "residual": {"epoch": 0, "ranks": [2, 2]}}


# A rank that a client lowers by itself.

HALF = Pruning(0.5, 0.25)
PRUNING = build(parts(pruning=HALF))


def test_a_client_whose_tail_has_shrunk_drops_it_for_good() -> None:
    """From far above 4, each number walks towards 4, so the tail shrinks each round: rank 4, 2, 1."""
    memory = Memory()
    for round_, (trained, kept) in enumerate([(4, 2), (2, 1), (1, 1)]):
        reply, memory, toy = fit(PRUNING, memory=memory, round_=round_)
        assert toy.jobs[0].pruning == HALF
        assert toy.seen[0].spec == at_rank(WIDE, trained)
        assert reply.manifest["rank"] == memory.fields["rank"] == kept
        update, own = learned(reply, PRUNING, round_=round_ + 1), at_rank(WIDE, kept)
        assert update.spec == own
        share = 1 / (2 + round_)
        for key, value in resized(counted(), own).items():
            np.testing.assert_allclose(update.delta[key], share * (4 - value), rtol=1e-5)


def test_a_client_whose_tail_has_grown_keeps_its_rank() -> None:
    class Growing(Toy):
        def fit(self, adapter: AdapterState, job: FitJob) -> Fitted:
            after = {key: 2 * value for key, value in adapter.tensors.items()}
            return Fitted(adapter.tensors, after, 1, 1, job.position + 1, {"loss": 1.0})

    request = fit_request(PRUNING, wide_state(), WIDE_SESSION, 0)
    reply, memory = handle(request, Memory(), site(0, PRUNING, Growing(0, spec=WIDE)))
    assert reply.manifest["rank"] == 4
    assert "rank" not in memory.fields


def test_a_client_scores_at_the_rank_that_it_has_pruned_itself_to() -> None:
    toy = Toy(0, spec=WIDE)
    request = evaluate_request(PRUNING, wide_state(), WIDE_SESSION, 0)
    handle(request, Memory({}, {"rank": 2}), site(0, PRUNING, toy))
    assert toy.seen[0].spec == at_rank(WIDE, 2)
    assert flat(toy.seen[0].tensors) == flat(resized(counted(), at_rank(WIDE, 2)))


# What a client says of itself.


@pytest.mark.parametrize(
    ("rank", "memory_bytes", "fields", "expected"),
    [
        (0, 0, {}, (0, 0)),
        (3, 7, {}, (3, 7)),
        (0, 7, {"rank": 2}, (2, 7)),
        (3, 0, {"rank": 2}, (2, 0)),
        (1, 0, {"rank": 2}, (1, 0)),
    ],
)
def test_a_client_says_its_rank_and_its_memory(
    rank: int, memory_bytes: int, fields: dict[str, int], expected: tuple[int, int]
) -> None:
    memory = Memory({}, fields)
    own = site(0, learner=Toy(0, spec=WIDE), rank=rank, memory_bytes=memory_bytes)
    reply, after = handle(describe_request(wide_state(4), WIDE_SESSION), memory, own)
    assert reply.kind == "description"
    assert (reply.manifest["rank"], reply.manifest["memory_bytes"]) == expected
    assert {key: reply.manifest[key] for key in ("round", "partition", "spec")} == {
        "round": 5,
        "partition": 0,
        "spec": WIDE.digest,
    }
    assert after is memory


# Control variates.

CONTROLLED = build(replace(parts(), controls=4))


def test_control_variates_by_hand() -> None:
    """c = 5 at the server. The gradients are 1, and the client's own variate is 0 at first and then 1."""
    five = {key: np.full(shape, 5, np.float32) for key, shape in WIDE.shapes.items()}
    reply, memory, toy = fit(CONTROLLED, control=five)
    assert set(flat(toy.jobs[0].correction)) == {5.0}
    assert set(flat(learned(reply, CONTROLLED).control)) == {1.0}
    assert memory.tensors.keys() == {f"control/{key}" for key in WIDE.shapes}
    assert set(flat(memory.tensors)) == {1.0}
    reply, memory, toy = fit(CONTROLLED, memory=memory, control=five, round_=1)
    assert set(flat(toy.jobs[0].correction)) == {4.0}
    assert set(flat(learned(reply, CONTROLLED, round_=2).control)) == {0.0}
    assert set(flat(memory.tensors)) == {1.0}


@pytest.mark.parametrize("stage", [freeze(["*.A"]), keep_local(["*.A"])])
def test_what_is_not_shared_has_no_control_variate(stage: Stage) -> None:
    plan = build(replace(parts(stage), controls=4))
    held = plan.init("run-1", 0, wide_state().adapter)
    reply, memory, toy = fit(plan, control=held.control)
    shared = WIDE.without(["*.A"]).shapes.keys()
    assert toy.jobs[0].correction.keys() == shared
    assert learned(reply, plan).control.keys() == shared
    assert {key for key in memory.tensors if key.startswith("control/")} == {f"control/{key}" for key in shared}


def test_a_variate_of_another_rank_is_cut_or_padded() -> None:
    ones = {key: np.ones(shape, np.float32) for key, shape in WIDE.shapes.items()}
    _, memory, _ = fit(CONTROLLED, rank=2, control=ones)
    for rank in (1, 4):
        _, _, toy = fit(CONTROLLED, rank=rank, memory=memory, control=ones, round_=1)
        correction = toy.jobs[0].correction
        assert {key: value.shape for key, value in correction.items()} == at_rank(WIDE, rank).shapes
        assert correction["left.A"].tolist() == [[0.0] * 7] * min(rank, 2) + [[1.0] * 7] * (rank - min(rank, 2))


def test_without_control_variates_none_is_kept() -> None:
    reply, memory, toy = fit()
    assert toy.jobs[0].correction == {}
    assert memory.tensors == {}
    assert len(reply.body) == 4 * WIDE.parameters
