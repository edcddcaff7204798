"""Server optimisers: how the merged delta moves the adapter."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from fedpeft.adapters import AdapterSpec, Tensors


class Optimizer(NamedTuple):
    """`init(spec)` gives the optimiser's tensors; `apply(state, adapter, delta)` the next (state, adapter).

    `delta` may lack tensors that are not shared; those do not move.
    """

    init: Callable[[AdapterSpec], Tensors]
    apply: Callable[[Tensors, Tensors, Tensors], tuple[Tensors, Tensors]]


def sgd(learning_rate: float) -> Optimizer:
    """The adapter moves by `learning_rate` times the merged delta; 1 is federated averaging.

    Source: Reddi et al. 2021, "Adaptive Federated Optimization", algorithm 1 with SGD as the server optimiser.
    """
    rate = np.float32(learning_rate)

    def apply(state: Tensors, adapter: Tensors, delta: Tensors) -> tuple[Tensors, Tensors]:
        return state, {key: value + rate * delta[key] if key in delta else value for key, value in adapter.items()}

    return Optimizer(lambda spec: {}, apply)  # noqa: ARG005
