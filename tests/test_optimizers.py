import numpy as np

from fedpeft.optimizers import sgd
from tests.toys import SPEC, flat, numbers


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
