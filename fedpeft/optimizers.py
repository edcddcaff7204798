"""Server optimisers: how the merged delta moves the adapter.

The delta is trained minus received, so the adapter moves along it: it stands where a gradient with its sign
turned would stand. Every rule but SGD keeps moments of each number, in float64, in which squares of float32
neither overflow nor vanish and which files hold to the bit; they take 8 bytes each. What moves is computed in
float64 too, and the new adapter rounded to float32 once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from fedpeft.adapters import AdapterSpec, Tensors

CONVENTIONS: Mapping[str, Callable[[float], float]] = {"sum": lambda beta: 1.0, "average": lambda beta: 1.0 - beta}  # noqa: ARG005
"""The share of a new delta in the momentum, from beta, by the name of the convention."""


class Optimizer(NamedTuple):
    """`init(spec)` gives the optimiser's tensors; `apply(state, adapter, delta)` the next (state, adapter).

    Adapter and delta are float32. `delta` may lack tensors of the adapter, because they are not shared or were not
    trained in this round: neither they nor their moments nor the count of their steps change by a bit. `plain`: the
    adapter moves by the delta as it is, and nothing is kept from round to round.
    """

    init: Callable[[AdapterSpec], Tensors]
    apply: Callable[[Tensors, Tensors, Tensors], tuple[Tensors, Tensors]]
    plain: bool


class _Rule(NamedTuple):
    """What an optimiser does with one tensor.

    `start(shape)` gives the moments before the first step, by name; `step(moments, delta)` the next moments, and how
    far the tensor moves. The delta and the move are float64.
    """

    start: Callable[[tuple[int, ...]], Tensors]
    step: Callable[[Tensors, np.ndarray], tuple[Tensors, np.ndarray]]


def sgd(learning_rate: float) -> Optimizer:
    """The adapter moves by `learning_rate` times the merged delta; 1 is federated averaging.

    Source: Reddi et al. 2021, "Adaptive Federated Optimization", algorithm 1 with SGD as the server optimiser.
    """
    rate = np.float32(learning_rate)

    def apply(state: Tensors, adapter: Tensors, delta: Tensors) -> tuple[Tensors, Tensors]:
        return state, {key: value + rate * delta[key] if key in delta else value for key, value in adapter.items()}

    return Optimizer(lambda spec: {}, apply, plain=bool(rate == 1))  # noqa: ARG005


def momentum(learning_rate: float, beta: float, convention: str) -> Optimizer:
    """The adapter moves by `learning_rate` times a decaying sum, or average, of the merged deltas.

    With `convention` "sum" (heavy ball, as in PyTorch's SGD): v = beta v + delta. With "average":
    v = beta v + (1 - beta) delta. Then x = x + learning_rate v. Both start at v = 0. A steady delta ends up moving
    the adapter by learning_rate / (1 - beta) deltas a round under "sum", by learning_rate of them under "average";
    so "sum" at a rate is "average" at that rate over 1 - beta.

    Source: Hsu et al. 2019, "Measuring the Effects of Non-Identical Data Distribution for Federated Visual
    Classification" (FedAvgM), is "sum"; "average" is the first moment of `adam`.
    """
    share = CONVENTIONS[convention](beta)

    def step(moments: Tensors, delta: np.ndarray) -> tuple[Tensors, np.ndarray]:
        first = beta * moments["first_moment"] + share * delta
        return {"first_moment": first}, learning_rate * first

    return _tensor_by_tensor(_Rule(lambda shape: {"first_moment": np.zeros(shape)}, step))


def adagrad(learning_rate: float, beta1: float, tau: float, initial_accumulator: float) -> Optimizer:
    """Each number moves the less, the larger its deltas have been in all rounds so far.

    m = beta1 m + (1 - beta1) delta from m = 0, v = v + delta² from v = initial_accumulator,
    x = x + learning_rate m / (√v + tau).

    Source: Reddi et al. 2021, algorithm 2 (FedAdagrad).
    """
    return _adaptive(learning_rate, beta1, tau, initial_accumulator, lambda before, square: before + square, (0.0, 0.0))


def adam(
    learning_rate: float, beta1: float, beta2: float, tau: float, initial_accumulator: float, bias_correction: bool
) -> Optimizer:
    """Each number moves the less, the larger its deltas have been of late.

    m = beta1 m + (1 - beta1) delta from m = 0, v = beta2 v + (1 - beta2) delta² from v = initial_accumulator,
    x = x + learning_rate m / (√v + tau). With `bias_correction`, m and v are divided in the last formula by
    1 - beta1^t and 1 - beta2^t, where t counts the rounds that had a delta of this tensor; with
    initial_accumulator 0 that is Adam as first published, and as in PyTorch. There tau is added after the
    correction; the shorter form, learning_rate √(1 - beta2^t) / (1 - beta1^t) m / (√v + tau), adds it before, which
    makes it larger by 1 / √(1 - beta2^t).

    Source: Reddi et al. 2021, algorithm 2 (FedAdam), without correction and from v ≥ tau²; Kingma and Ba 2015,
    "Adam: A Method for Stochastic Optimization", algorithm 1, with correction and from v = 0.
    """

    def second(before: np.ndarray, square: np.ndarray) -> np.ndarray:
        return beta2 * before + (1 - beta2) * square

    corrected = (beta1, beta2) if bias_correction else (0.0, 0.0)
    return _adaptive(learning_rate, beta1, tau, initial_accumulator, second, corrected)


def yogi(
    learning_rate: float, beta1: float, beta2: float, tau: float, initial_accumulator: float, bias_correction: bool
) -> Optimizer:
    """As `adam`, but what is remembered of past deltas falls no faster than the new delta allows.

    v = v - (1 - beta2) sign(v - delta²) delta²; all else as in `adam`, `bias_correction` too, which neither source
    has and TensorFlow Federated and Optax do.

    Source: Zaheer et al. 2018, "Adaptive Methods for Nonconvex Optimization", algorithm 2; Reddi et al. 2021,
    algorithm 2 (FedYogi).
    """

    def second(before: np.ndarray, square: np.ndarray) -> np.ndarray:
        after: np.ndarray = before - (1 - beta2) * np.sign(before - square) * square
        return after

    corrected = (beta1, beta2) if bias_correction else (0.0, 0.0)
    return _adaptive(learning_rate, beta1, tau, initial_accumulator, second, corrected)


def _adaptive(
    learning_rate: float,
    beta1: float,
    tau: float,
    initial_accumulator: float,
    next_second: Callable[[np.ndarray, np.ndarray], np.ndarray],
    corrected: tuple[float, float],
) -> Optimizer:
    """Moves by the first moment over the root of the second.

    Each is divided by the share of it that deltas have filled, 1 - b^t with b from `corrected` (0: all of it).
    """

    def start(shape: tuple[int, ...]) -> Tensors:
        return {
            "first_moment": np.zeros(shape),
            "second_moment": np.full(shape, initial_accumulator, np.float64),
            "steps": np.zeros((), np.int64),
        }

    def step(moments: Tensors, delta: np.ndarray) -> tuple[Tensors, np.ndarray]:
        first = beta1 * moments["first_moment"] + (1 - beta1) * delta
        second = next_second(moments["second_moment"], np.square(delta))
        steps = moments["steps"] + 1
        filled_first, filled_second = (1 - beta ** int(steps) for beta in corrected)
        move = learning_rate * (first / filled_first) / (np.sqrt(second / filled_second) + tau)
        return {"first_moment": first, "second_moment": second, "steps": steps}, move

    return _tensor_by_tensor(_Rule(start, step))


def _tensor_by_tensor(rule: _Rule) -> Optimizer:
    """Applies `rule` to each tensor that the delta has; moments are kept under `name/key of the tensor`."""
    names = tuple(rule.start(()))

    def init(spec: AdapterSpec) -> Tensors:
        return {
            f"{name}/{key}": value for key, shape in spec.shapes.items() for name, value in rule.start(shape).items()
        }

    def apply(state: Tensors, adapter: Tensors, delta: Tensors) -> tuple[Tensors, Tensors]:
        kept, moved = dict(state), dict(adapter)
        for key in adapter:
            if key not in delta:
                continue
            before = {name: state[f"{name}/{key}"] for name in names}
            after, move = rule.step(before, delta[key].astype(np.float64))
            # Arithmetic makes plain numbers of arrays without a dimension, and files hold arrays only.
            kept |= {f"{name}/{key}": np.asarray(value) for name, value in after.items()}
            moved[key] = np.asarray(adapter[key] + move, np.float32)
        return kept, moved

    return Optimizer(init, apply, plain=False)
