from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedpeft import checkpoint
from fedpeft.adapters import AdapterSpec, AdapterState, ModuleSpec, Tensors
from fedpeft.optimizers import Optimizer, adagrad, adam, momentum, sgd, yogi
from fedpeft.updates import ServerState
from tests.toys import SPEC, flat, numbers

RULES: dict[str, Optimizer] = {
    "sgd": sgd(0.5),
    "momentum sum": momentum(0.5, 0.9, "sum"),
    "momentum average": momentum(0.5, 0.9, "average"),
    "adagrad": adagrad(0.1, 0.0, 1e-3, 1e-6),
    "adagrad with momentum": adagrad(0.1, 0.5, 1e-3, 0.0),
    "adam": adam(0.1, 0.9, 0.99, 1e-3, 1e-6, False),
    "adam corrected": adam(0.1, 0.9, 0.99, 1e-3, 0.0, True),
    "yogi": yogi(0.1, 0.9, 0.99, 1e-3, 1e-6, False),
    "yogi corrected": yogi(0.1, 0.9, 0.99, 1e-3, 1e-6, True),
}
KEEPING = sorted(set(RULES) - {"sgd"})
every_rule = pytest.mark.parametrize("name", sorted(RULES))
every_keeping_rule = pytest.mark.parametrize("name", KEEPING)

values = st.floats(-100, 100, width=32)
triples = st.tuples(values, values, values)
histories = st.lists(triples, min_size=1, max_size=4)
# A round lacks the tensors that were not trained in it.
partial = st.builds(
    lambda delta, keys: {key: value for key, value in numbers(*delta).items() if key in keys},
    triples,
    st.sets(st.sampled_from(sorted(SPEC.shapes))),
)


def as_tensors(tensors: Tensors) -> Tensors:
    return tensors


def walk(rule: Optimizer, adapter: Tensors, deltas: Sequence[Tensors], state: Tensors | None = None) -> list[Tensors]:
    """State and adapter after the deltas, one after another."""
    state = rule.init(SPEC) if state is None else state
    for delta in deltas:
        state, adapter = rule.apply(state, adapter, delta)
    return [state, adapter]


def bits(tensors: Mapping[str, np.ndarray]) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return {key: (value.dtype.str, value.shape, value.tobytes()) for key, value in sorted(tensors.items())}


def path_of(rule: Optimizer, start: float, deltas: Sequence[float]) -> list[float]:
    """Where one number goes, step by step."""
    state, adapter, found = rule.init(SPEC), as_tensors(numbers(start, 0, 0)), []
    for delta in deltas:
        state, adapter = rule.apply(state, adapter, numbers(delta, 0, 0))
        found.append(float(adapter["head.weight"][0]))
    return found


# Goldens


def test_sgd_moves_by_rate_times_delta() -> None:
    state, after = sgd(0.5).apply({}, numbers(1, 2, 3), numbers(2, -4, 0.5))
    assert flat(after) == [2.0, 0.0, 3.25]
    assert state == {}
    assert sgd(0.5).init(SPEC) == {}
    assert {value.dtype for value in after.values()} == {np.dtype(np.float32)}


def test_sgd_at_one_adds_the_delta() -> None:
    assert flat(sgd(1.0).apply({}, numbers(1, 2, 3), numbers(0.25, 0, -3))[1]) == [1.25, 2.0, 0.0]


def test_sgd_leaves_what_is_not_shared_and_its_inputs() -> None:
    adapter, delta = numbers(1, 2, 3), {"layer.A": np.array([[1]], np.float32)}
    _, after = sgd(1.0).apply({}, adapter, delta)
    assert flat(after) == [1.0, 3.0, 3.0]
    assert flat(adapter) == [1.0, 2.0, 3.0]


@pytest.mark.parametrize(
    ("convention", "velocities", "expected"),
    [
        # v = v/2 + delta: 2; 1 + 0; 1/2 + 1, and so on for the other two numbers; x moves by v/2.
        ("sum", [[2, -4, 0.5], [1, 2, 1.25], [1.5, 1, -1.375]], [[2, 0, 3.25], [2.5, 1, 3.875], [3.25, 1.5, 3.1875]]),
        # v = v/2 + delta/2: each v is half of the one above.
        (
            "average",
            [[1, -2, 0.25], [0.5, 1, 0.625], [0.75, 0.5, -0.6875]],
            [[1.5, 1, 3.125], [1.75, 1.5, 3.4375], [2.125, 1.75, 3.09375]],
        ),
    ],
)
def test_momentum_by_hand(convention: str, velocities: list[list[float]], expected: list[list[float]]) -> None:
    rule = momentum(0.5, 0.5, convention)
    state, adapter = rule.init(SPEC), as_tensors(numbers(1, 2, 3))
    for round_, delta in enumerate([(2, -4, 0.5), (0, 4, 1), (1, 0, -2)]):
        state, adapter = rule.apply(state, adapter, numbers(*delta))
        assert flat(state) == velocities[round_]
        assert flat(adapter) == expected[round_]


def test_adagrad_by_hand() -> None:
    # v = 9, then 9 + 4² = 5², 5² + 12² = 13², 13² + 84² = 85²; x moves by delta/2 over √v + 3.
    found = path_of(adagrad(0.5, 0.0, 3.0, 9.0), 1.0, [4, -12, 84])
    steps = [0.5 * 4 / (5 + 3), -0.5 * 12 / (13 + 3), 0.5 * 84 / (85 + 3)]
    assert found == pytest.approx([1 + steps[0], 1 + sum(steps[:2]), 1 + sum(steps)], rel=1e-7)


def test_adagrad_with_momentum_by_hand() -> None:
    # m = 0/2 + 4/2 = 2, then 2/2 + 12/2 = 7; v as above.
    assert path_of(adagrad(0.5, 0.5, 3.0, 9.0), 1.0, [4, 12]) == [1 + 0.5 * 2 / 8, 1 + 0.125 + 0.5 * 7 / 16]


def test_adam_by_hand() -> None:
    # v = 1/2 + 1/2 = 1², 1/2 + 49/2 = 5², 25/2 + 25/2 = 5²; m = 1/2, 1/4 + 7/2 = 3.75, 1.875 - 5/2 = -0.625.
    found = path_of(adam(1.0, 0.5, 0.5, 1.0, 1.0, False), 2.0, [1, 7, -5])
    assert found == pytest.approx([2.25, 2.25 + 3.75 / 6, 2.875 - 0.625 / 6], rel=1e-7)


def test_adam_with_bias_correction_by_hand() -> None:
    # v = 2, 1 + 22²/2 = 243, 243/2, over 1/2, 3/4, 7/8: 2², 18², 138.857; m = 1, 11.5, 5.75 over the same.
    found = path_of(adam(1.0, 0.5, 0.5, 2.0, 0.0, True), 0.0, [2, 22, 0])
    third = (5.75 / 0.875) / (math.sqrt(121.5 / 0.875) + 2)
    assert found == pytest.approx([0.5, 0.5 + 15.333333333 / 20, 1.266666667 + third], rel=1e-7)


def test_bias_correction_divides_what_the_accumulator_began_with_too() -> None:
    # v = 24/4 + 3 × 2²/4 = 9 over 3/4; m = 2/2 over 1/2.
    assert path_of(adam(1.0, 0.5, 0.25, 1.0, 24.0, True), 0.0, [2]) == pytest.approx([2 / (math.sqrt(12) + 1)])
    # v = 1 + 3 × 2²/4 = 4 over 3/4.
    assert path_of(yogi(1.0, 0.5, 0.25, 1.0, 1.0, True), 0.0, [2]) == pytest.approx([2 / (math.sqrt(4 / 0.75) + 1)])


def test_yogi_by_hand() -> None:
    # v = 4 < 3²: 4 + 9/4 = 2.5². v > 1.5²: 6.25 - 2.25/4. m = 3/2, then 0.75 + 1.5/2 = 1.5.
    found = path_of(yogi(1.0, 0.5, 0.75, 1.5, 4.0, False), 0.0, [3, 1.5])
    assert found == pytest.approx([1.5 / 4, 0.375 + 1.5 / (math.sqrt(5.6875) + 1.5)], rel=1e-7)


def test_yogi_keeps_its_accumulator_where_the_delta_is_as_large_or_zero() -> None:
    rule = yogi(1.0, 0.5, 0.75, 1.5, 4.0, False)
    state, _ = walk(rule, numbers(0, 0, 0), [numbers(2, 0, -2)])
    assert [float(state[f"second_moment/{key}"].item()) for key in SPEC.shapes] == [4.0, 4.0, 4.0]
    # Where Adam forgets: 4 × 0.75 + 2²/4, 4 × 0.75.
    state, _ = walk(adam(1.0, 0.5, 0.75, 1.5, 4.0, False), numbers(0, 0, 0), [numbers(2, 0, -2)])
    assert [float(state[f"second_moment/{key}"].item()) for key in SPEC.shapes] == [4.0, 3.0, 4.0]


@pytest.mark.parametrize("name", ["adagrad with momentum", "adam", "adam corrected", "yogi"])
def test_state_has_moments_and_a_count_for_each_tensor(name: str) -> None:
    spec = AdapterSpec("base", "head", (ModuleSpec("one", "full", 0, 1.0, (("b", (3,)), ("w", (2, 3)))),))
    state = RULES[name].init(spec)
    assert {key: value.shape for key, value in state.items()} == {
        "first_moment/one.b": (3,),
        "second_moment/one.b": (3,),
        "steps/one.b": (),
        "first_moment/one.w": (2, 3),
        "second_moment/one.w": (2, 3),
        "steps/one.w": (),
    }
    assert {key.split("/")[0]: value.dtype for key, value in state.items()} == {
        "first_moment": np.float64,
        "second_moment": np.float64,
        "steps": np.int64,
    }


def test_only_sgd_at_one_is_plain() -> None:
    assert sgd(1.0).plain
    assert not any(rule.plain for rule in (*RULES.values(), sgd(0.999), momentum(1.0, 0.0, "sum")))


# Parity with PyTorch


def torch_path(
    optimizer: Callable[[list[torch.Tensor]], torch.optim.Optimizer], start: np.ndarray, deltas: list[np.ndarray]
) -> np.ndarray:
    """Where PyTorch's optimiser goes, in float64, when minus the delta is its gradient."""
    parameter = torch.tensor(start, dtype=torch.float64)
    made = optimizer([parameter])
    for delta in deltas:
        parameter.grad = -torch.tensor(delta, dtype=torch.float64)
        made.step()
    return parameter.numpy()


TORCH: dict[str, tuple[Optimizer, Callable[[list[torch.Tensor]], torch.optim.Optimizer]]] = {
    "sgd": (sgd(0.25), lambda parameters: torch.optim.SGD(parameters, 0.25)),
    "momentum": (momentum(0.3, 0.9, "sum"), lambda parameters: torch.optim.SGD(parameters, 0.3, momentum=0.9)),
    "adagrad": (
        adagrad(0.3, 0.0, 1e-2, 0.04),
        lambda parameters: torch.optim.Adagrad(parameters, 0.3, initial_accumulator_value=0.04, eps=1e-2),
    ),
    # PyTorch too adds eps to the root of the corrected moment, so that a large one tells the forms apart.
    "adam": (
        adam(0.3, 0.8, 0.95, 0.5, 0.0, True),
        lambda parameters: torch.optim.Adam(parameters, 0.3, (0.8, 0.95), eps=0.5),
    ),
}


@pytest.mark.parametrize("name", sorted(TORCH))
@given(history=st.lists(st.tuples(values, values, values), min_size=1, max_size=8))
def test_it_goes_where_pytorch_goes(name: str, history: list[tuple[float, float, float]]) -> None:
    rule, reference = TORCH[name]
    spec = AdapterSpec("base", "head", (ModuleSpec("one", "full", 0, 1.0, (("w", (3,)),)),))
    deltas = [np.array(delta, np.float32) for delta in history]
    start = np.array([1, -2, 3], np.float32)
    state, adapter = rule.init(spec), as_tensors({"one.w": start})
    for delta in deltas:
        state, adapter = rule.apply(state, adapter, {"one.w": delta})
    scale = 10 + sum(float(np.abs(delta).max()) for delta in deltas)
    np.testing.assert_allclose(adapter["one.w"], torch_path(reference, start, deltas), rtol=0, atol=1e-6 * scale)


# Laws


@every_rule
@given(adapter=triples)
def test_a_zero_delta_moves_nothing_at_first(name: str, adapter: tuple[float, float, float]) -> None:
    _, after = walk(RULES[name], numbers(*adapter), [numbers(0, 0, 0)] * 2)
    assert flat(after) == flat(numbers(*adapter))


@every_rule
@given(delta=triples)
def test_the_first_move_is_along_the_delta(name: str, delta: tuple[float, float, float]) -> None:
    _, after = walk(RULES[name], numbers(0, 0, 0), [numbers(*delta)])
    for moved, value in zip(flat(after), flat(numbers(*delta)), strict=True):
        assert moved * value > 0 or abs(value) < 1e-30


@every_rule
@given(adapter=triples, before=st.lists(partial, max_size=3), delta=partial)
def test_what_is_missing_does_not_change_by_a_bit(
    name: str, adapter: tuple[float, float, float], before: list[Tensors], delta: Tensors
) -> None:
    state, at = walk(RULES[name], numbers(*adapter), before)
    next_state, after = walk(RULES[name], at, [delta], state)
    missing = set(SPEC.shapes) - set(delta)
    assert bits({key: after[key] for key in missing}) == bits({key: at[key] for key in missing})
    kept = {key for key in state if key.split("/")[1] in missing}
    assert bits({key: next_state[key] for key in kept}) == bits({key: state[key] for key in kept})
    assert (set(next_state), set(after)) == (set(state), set(at))


@every_rule
@given(adapter=triples, history=st.lists(partial, max_size=5))
def test_a_tensor_goes_as_if_it_were_alone_and_rounds_without_it_were_not(
    name: str, adapter: tuple[float, float, float], history: list[Tensors]
) -> None:
    state, after = walk(RULES[name], numbers(*adapter), history)
    for key in SPEC.shapes:
        alone = [{key: delta[key]} for delta in history if key in delta]
        state_alone, after_alone = walk(RULES[name], numbers(*adapter), alone)
        assert after[key].tobytes() == after_alone[key].tobytes()
        own = [one for one in state if one.endswith(f"/{key}")]
        assert bits({one: state[one] for one in own}) == bits({one: state_alone[one] for one in own})


@every_keeping_rule
def test_a_state_without_the_tensors_that_stay_with_their_sites(name: str) -> None:
    shared = SPEC.without(["layer.A"])
    state = RULES[name].init(shared)
    assert not [key for key in state if key.endswith("layer.A")]
    delta = {key: value for key, value in numbers(1, 1, 1).items() if key != "layer.A"}
    state, after = RULES[name].apply(state, numbers(1, 2, 3), delta)
    assert set(state) == set(RULES[name].init(shared))
    assert (flat(after)[1], flat(after)[0] > 1, flat(after)[2] > 3) == (2.0, True, True)


@every_rule
@given(adapter=triples, history=histories)
def test_inputs_are_not_written_to(
    name: str, adapter: tuple[float, float, float], history: list[tuple[float, float, float]]
) -> None:
    state, at = RULES[name].init(SPEC), as_tensors(numbers(*adapter))
    for delta in (numbers(*one) for one in history):
        inputs = (state, at, delta)
        before = [bits(tensors) for tensors in inputs]
        for tensors in inputs:
            for value in tensors.values():
                value.flags.writeable = False
        state, at = RULES[name].apply(*inputs)
        assert [bits(tensors) for tensors in inputs] == before
        assert {(value.dtype, type(value)) for value in at.values()} == {(np.dtype(np.float32), np.ndarray)}
        assert {type(value) for value in state.values()} <= {np.ndarray}


@every_rule
@given(adapter=triples, history=st.lists(partial, min_size=1, max_size=5), data=st.data())
def test_stopping_is_never_noticed(
    tmp_path_factory: pytest.TempPathFactory,
    name: str,
    adapter: tuple[float, float, float],
    history: list[Tensors],
    data: Any,
) -> None:
    stop = data.draw(st.integers(0, len(history)))
    folder = tmp_path_factory.mktemp("stops")
    state, at = walk(RULES[name], numbers(*adapter), history[:stop])
    checkpoint.save(folder, ServerState("run", stop, 0, AdapterState(SPEC, at), state))
    back = checkpoint.load(folder)
    assert bits(back.optimizer) == bits(state)
    resumed = walk(RULES[name], back.adapter.tensors, history[stop:], back.optimizer)
    whole = walk(RULES[name], numbers(*adapter), history)
    assert [bits(tensors) for tensors in resumed] == [bits(tensors) for tensors in whole]


full = st.floats(width=32, allow_nan=False, allow_infinity=False)


@pytest.mark.parametrize("name", [name for name in KEEPING if name.startswith(("ada", "yogi"))])
@given(history=st.lists(st.tuples(full, full, full), min_size=1, max_size=4))
def test_any_delta_of_float32_moves_a_little_and_leaves_finite_moments(
    name: str, history: list[tuple[float, float, float]]
) -> None:
    state, after = walk(RULES[name], numbers(0, 0, 0), [numbers(*delta) for delta in history])
    assert all(np.isfinite(value).all() for value in state.values())
    assert all((state[f"second_moment/{key}"] >= 0).all() for key in SPEC.shapes)
    # m is a mean of the deltas and v one of their squares, so in four rounds |m| is at most about 2 √v.
    assert max(map(abs, flat(after))) <= 0.1 * 2.1 * len(history)


@pytest.mark.parametrize("convention", ["sum", "average"])
@given(delta=st.tuples(full, full, full))
def test_any_delta_of_float32_can_be_remembered(convention: str, delta: tuple[float, float, float]) -> None:
    state, after = walk(momentum(0.25, 0.5, convention), numbers(0, 0, 0), [numbers(*delta)] * 2)
    velocity, moved = {"sum": (1.5, 0.625), "average": (0.75, 0.3125)}[convention]
    assert flat(state) == [velocity * value for value in flat(numbers(*delta))]
    assert flat(after) == pytest.approx([moved * value for value in flat(numbers(*delta))], rel=1e-6, abs=1e-44)


def test_an_adapter_beyond_float32_is_infinite_and_its_moments_are_not() -> None:
    largest = float(np.finfo(np.float32).max)
    with np.errstate(invalid="raise", divide="raise", over="ignore"):
        state, after = walk(momentum(1.0, 0.5, "sum"), numbers(0, 0, 0), [numbers(largest, -largest, 0)] * 3)
    assert flat(after) == [math.inf, -math.inf, 0]
    assert flat(state) == [1.75 * largest, -1.75 * largest, 0]


def test_squares_below_float32_are_not_lost() -> None:
    # (1e-30)² is 0 in float32, and the move would be 1e-30 / 1e-35 instead of 1.
    for rule in (adagrad(1.0, 0.0, 1e-35, 0.0), adam(1.0, 0.9, 0.99, 1e-35, 0.0, True)):
        assert path_of(rule, 0.0, [1e-30]) == pytest.approx([1.0], rel=1e-4)


@given(adapter=triples, history=histories, beta=st.floats(0, 0.99))
def test_a_sum_is_an_average_at_a_higher_rate(
    adapter: tuple[float, float, float], history: list[tuple[float, float, float]], beta: float
) -> None:
    deltas = [numbers(*delta) for delta in history]
    _, one = walk(momentum(0.5, beta, "sum"), numbers(*adapter), deltas)
    _, other = walk(momentum(0.5 / (1 - beta), beta, "average"), numbers(*adapter), deltas)
    assert flat(one) == pytest.approx(flat(other), rel=1e-6, abs=1e-3)


@pytest.mark.parametrize(("convention", "deltas_a_round"), [("sum", 10.0), ("average", 1.0)])
def test_a_steady_delta_ends_up_moving_so_many_deltas_a_round(convention: str, deltas_a_round: float) -> None:
    found = path_of(momentum(0.5, 0.9, convention), 0.0, [1.0] * 200)
    assert found[-1] - found[-2] == pytest.approx(0.5 * deltas_a_round, rel=1e-4)


@given(adapter=triples, history=histories)
def test_momentum_that_forgets_all_is_sgd(
    adapter: tuple[float, float, float], history: list[tuple[float, float, float]]
) -> None:
    deltas = [numbers(*delta) for delta in history]
    expected = flat(walk(sgd(1.0), numbers(*adapter), deltas)[1])
    for convention in ("sum", "average"):
        assert flat(walk(momentum(1.0, 0.0, convention), numbers(*adapter), deltas)[1]) == expected
