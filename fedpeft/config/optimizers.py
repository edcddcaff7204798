"""Settings of the server's optimiser: how the merged delta moves the adapter."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedpeft.config.fields import Table, require, require_range
from fedpeft.optimizers import CONVENTIONS, Optimizer, adagrad, adam, momentum, sgd, yogi

_FLOAT32 = np.finfo(np.float32)


@dataclass(frozen=True)
class Sgd:
    """The merged delta times `learning_rate` is added to the adapter; 1 is FedAvg."""

    learning_rate: float = 1.0

    def __post_init__(self) -> None:
        require(self.learning_rate > 0, "learning_rate", expected="a number above 0", found=self.learning_rate)

    def build(self) -> Optimizer:
        """The server optimiser that these settings describe."""
        return sgd(self.learning_rate)


@dataclass(frozen=True)
class Momentum:
    """`learning_rate` times a decaying sum, or average, of the merged deltas is added to the adapter.

    With `convention` "sum", v = beta v + delta (FedAvgM, PyTorch's SGD): a steady delta ends up moving the adapter by
    learning_rate / (1 - beta) deltas a round. With "average", v = beta v + (1 - beta) delta: by learning_rate of them.
    """

    learning_rate: float = 1.0
    beta: float = 0.9
    convention: str = "sum"

    def __post_init__(self) -> None:
        _require_positive(self, "learning_rate")
        _require_decay(self, "beta")
        require(
            self.convention in CONVENTIONS,
            "convention",
            expected=f"one of {', '.join(CONVENTIONS)}",
            found=self.convention,
            remedy="choose one of them",
        )

    def build(self) -> Optimizer:
        """The server optimiser that these settings describe."""
        return momentum(self.learning_rate, self.beta, self.convention)


@dataclass(frozen=True)
class Adagrad:
    """Numbers whose deltas have been large move less: by learning_rate m / (√v + tau) (FedAdagrad).

    v is the sum of delta² so far, from `initial_accumulator` × tau² (the paper's is 1); m is the average of deltas
    that decays with `beta1` (the paper's is 0: the delta itself). `learning_rate` is the most that a number moves in
    a round where beta1 is 0.
    """

    learning_rate: float = 0.01
    beta1: float = 0.0
    tau: float = 1e-3
    initial_accumulator: float = 1.0

    def __post_init__(self) -> None:
        _require_positive(self, "learning_rate")
        _require_decay(self, "beta1")
        _require_accumulator(self)

    def build(self) -> Optimizer:
        """The server optimiser that these settings describe."""
        return adagrad(self.learning_rate, self.beta1, self.tau, self.initial_accumulator * self.tau**2)


@dataclass(frozen=True)
class Adam:
    """Numbers whose deltas have been large of late move less: by learning_rate m / (√v + tau) (FedAdam).

    m and v are the averages of delta and delta² that decay with `beta1` and `beta2`; v starts at
    `initial_accumulator` × tau² (the paper's is 1). `bias_correction` divides them by 1 - beta1^t and 1 - beta2^t;
    together with `initial_accumulator` 0 that is Adam outside federations. `learning_rate` is about the most that a
    number moves in a round.
    """

    learning_rate: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-3
    initial_accumulator: float = 1.0
    bias_correction: bool = False

    def __post_init__(self) -> None:
        _require_positive(self, "learning_rate")
        _require_decay(self, "beta1")
        _require_decay(self, "beta2")
        _require_accumulator(self)

    def build(self) -> Optimizer:
        """The server optimiser that these settings describe."""
        start = self.initial_accumulator * self.tau**2
        return adam(self.learning_rate, self.beta1, self.beta2, self.tau, start, self.bias_correction)


@dataclass(frozen=True)
class Yogi(Adam):
    """As `Adam`, but v falls no faster than the new delta allows: by (1 - beta2) delta² at most (FedYogi)."""

    def build(self) -> Optimizer:
        """The server optimiser that these settings describe."""
        start = self.initial_accumulator * self.tau**2
        return yogi(self.learning_rate, self.beta1, self.beta2, self.tau, start, self.bias_correction)


OPTIMIZERS = Table("kind", {"sgd": Sgd, "momentum": Momentum, "adagrad": Adagrad, "adam": Adam, "yogi": Yogi})


def _require_positive(settings: object, key: str) -> None:
    """Raises ConfigError unless `settings.key` is above 0 and within float32, so that no moment overflows."""
    value = getattr(settings, key)
    holds = float(_FLOAT32.tiny) <= value <= float(_FLOAT32.max)
    require(holds, key, expected="a number above 0 that float32 can hold", found=value)


def _require_decay(settings: object, key: str) -> None:
    """Raises ConfigError unless `0 <= settings.key < 1`."""
    value = getattr(settings, key)
    require(0 <= value < 1, key, expected="a number of at least 0 and below 1", found=value)


def _require_accumulator(settings: object) -> None:
    """Raises ConfigError unless tau is above 0 and the accumulator starts at 0 or above."""
    _require_positive(settings, "tau")
    require_range(settings, "initial_accumulator", 0.0, float(_FLOAT32.max))
