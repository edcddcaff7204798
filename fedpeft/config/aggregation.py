"""Settings of everything between a client's delta and the server's next adapter."""

from __future__ import annotations

from dataclasses import dataclass, field

from fedpeft.codecs import Codec, dense
from fedpeft.config.fields import Choice, Table, choice, require, require_range
from fedpeft.merges import WEIGHTS, Merge, mean
from fedpeft.optimizers import Optimizer, sgd
from fedpeft.stages import Stage, chain, clip, freeze, keep_local


@dataclass(frozen=True)
class Mean:
    """The weighted mean of the deltas (FedAvg, on adapters)."""

    weights: str = "examples"

    def __post_init__(self) -> None:
        require(
            self.weights in WEIGHTS,
            "weights",
            expected=f"one of {', '.join(WEIGHTS)}",
            found=self.weights,
            remedy="choose one of them",
        )

    def build(self) -> Merge:
        """The merge that these settings describe."""
        return mean(self.weights)


MERGES = Table("rule", {"mean": Mean})


@dataclass(frozen=True)
class Dense:
    """Every number as it is, in float32."""

    def build(self) -> Codec:
        """The codec that these settings describe."""
        return dense()


CODECS = Table("kind", {"dense": Dense})


@dataclass(frozen=True)
class Sgd:
    """The merged delta times `learning_rate` is added to the adapter; 1 is FedAvg."""

    learning_rate: float = 1.0

    def __post_init__(self) -> None:
        require(self.learning_rate > 0, "learning_rate", expected="a number above 0", found=self.learning_rate)

    def build(self) -> Optimizer:
        """The server optimiser that these settings describe."""
        return sgd(self.learning_rate)


OPTIMIZERS = Table("kind", {"sgd": Sgd})


@dataclass(frozen=True)
class StagesConfig:
    """What happens to a delta on its way to the wire, in this order; an empty list or 0 leaves a stage out.

    `frozen` tensors are not trained, `local` ones are trained and stay with their site (patterns as in
    `fnmatch`, against `module.path.tensor`); what is left is clipped to the norm `clip_norm`.
    """

    frozen: tuple[str, ...] = ()
    local: tuple[str, ...] = ()
    clip_norm: float = 0.0

    def __post_init__(self) -> None:
        require_range(self, "clip_norm", 0.0)

    def build(self) -> Stage:
        """The chain of the stages that are on."""
        stages = [
            *([freeze(self.frozen)] if self.frozen else []),
            *([keep_local(self.local)] if self.local else []),
            *([clip(self.clip_norm)] if self.clip_norm else []),
        ]
        return chain(*stages)


@dataclass(frozen=True)
class AggregationConfig:
    """How updates travel, are merged, and move the adapter."""

    stages: StagesConfig = field(default_factory=StagesConfig)
    codec: Choice = choice(CODECS, "dense")
    merge: Choice = choice(MERGES, "mean")
    optimizer: Choice = choice(OPTIMIZERS, "sgd")
