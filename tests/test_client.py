import math

import numpy as np
import pytest

from fedpeft.adapters import AdapterState
from fedpeft.client import FitJob, Fitted, handle
from fedpeft.errors import DataError
from fedpeft.stages import chain, clip, freeze, keep_local
from fedpeft.updates import Memory
from fedpeft.wire import Packet, evaluate_request, fit_request, read_update
from tests.toys import CONFIG, SESSION, SPEC, Toy, flat, numbers, site, state, strategy

REQUEST = fit_request(strategy(), state(0, 0, 0), SESSION)


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
    update = read_update(reply, plan, plan.stage.shared(SPEC), {**SESSION.manifest(1), "partition": 0})
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
    request = evaluate_request(plan, state(1, 2, 3), SESSION)
    reply, after = handle(request, memory, site(0, plan, learner))
    assert (reply.kind, reply.manifest["metric.accuracy"], reply.manifest["metric.rows"]) == ("evaluation", 7.0, 2.0)
    assert flat(learner.seen[-1].tensors) == [7, 2, 3]
    assert after is memory
    plain, _ = handle(request, memory, site(0, strategy(), learner))
    assert plain.manifest["metric.accuracy"] == 1.0


def test_the_norm_that_is_reported_is_the_norm_that_is_sent() -> None:
    plan = strategy(chain(freeze(["head.*"]), clip(1.0)))
    reply, _ = handle(REQUEST, Memory(), site(0, plan))
    assert reply.manifest["metric.update_norm"] == pytest.approx(1.0)
    assert reply.manifest["metric.clipped"] == 1.0


def raising(error: Exception) -> Toy:
    def breaks(job: FitJob) -> None:
        raise error

    return Toy(0, breaks=breaks)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (DataError("rows: expected some, found none; give some."), "rows: expected some, found none; give some."),
        (RuntimeError("out of memory"), "RuntimeError: out of memory"),
        (KeyError("x"), "KeyError: 'x'"),
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
@pytest.mark.parametrize("kind", ["fit", "evaluate"])
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
    assert "expected one of fit, evaluate, found 'delete'" in str(reply.manifest["reason"])


def test_the_config_of_the_site_is_what_counts() -> None:
    assert handle(REQUEST, Memory(), site(0, config=CONFIG))[0].kind == "update"
    assert handle(REQUEST, Memory(), site(0, config="mine"))[0].kind == "failure"


class Rounding(Toy):
    """Holds what it is given to a hundredth, as a model does that divides a scale out; learns nothing."""

    def fit(self, adapter: AdapterState, job: FitJob) -> Fitted:
        held = {key: np.round(value, 2) for key, value in adapter.tensors.items()}
        return Fitted(held, held, 1, 1, job.position + 1, {"loss": 1.0})


def test_a_delta_is_from_what_the_model_held_not_from_what_was_sent() -> None:
    request = fit_request(strategy(), state(1 / 3, 2 / 3, 1 / 7), SESSION)
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
