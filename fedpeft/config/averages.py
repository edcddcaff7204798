"""Settings of the published methods that average."""

from __future__ import annotations

from dataclasses import dataclass

from fedpeft.adapters import KINDS
from fedpeft.config.fields import require, require_range
from fedpeft.merges import (
    MISSING,
    WEIGHTS,
    Method,
    Pruning,
    by_product_norm,
    corrected,
    restarted,
    rule,
    truncated,
    with_residual,
)

SOLVED = tuple(name for name, kind in KINDS.items() if kind.solve)
"""The kinds of modules that take new factors."""


@dataclass(frozen=True)
class Weighted:
    """What every merge has: clients weigh by `examples`, by `tokens`, or are `uniform`."""

    weights: str = "examples"

    def __post_init__(self) -> None:
        known = ", ".join(WEIGHTS)
        require(self.weights in WEIGHTS, "weights", expected=f"one of {known}", found=self.weights)


@dataclass(frozen=True)
class Averaging(Weighted):
    """What a row or a module counts as that a node does not hold.

    With `missing` "zero" it is zero for that node; with "covered" it is averaged over those that hold it.
    """

    missing: str = "zero"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.missing in MISSING, "missing", expected=f"one of {', '.join(MISSING)}", found=self.missing)


@dataclass(frozen=True)
class FedAvg(Averaging):
    """The weighted mean of the deltas; on factors of a LoRA this is FedIT."""

    missing: str = "covered"

    def build(self) -> Method:
        """The method that these settings describe."""
        return Method(rule(self.weights, missing=self.missing))


@dataclass(frozen=True)
class ZeroPad(Weighted):
    """FedAvg on factors padded with zeros to the server's rank; nodes hold the leading rows."""

    def build(self) -> Method:
        """The method that these settings describe."""
        return Method(rule(self.weights))


@dataclass(frozen=True)
class HetLora(Weighted):
    """HetLoRA: padding with zeros, weights by the norm of what an adapter does, nodes that lower their own rank.

    `keep` is the part of its rank that a node goes down to (1: it never does), `penalty` what drives it there.
    """

    keep: float = 0.99
    penalty: float = 0.005

    def __post_init__(self) -> None:
        super().__post_init__()
        require_range(self, "keep", 0.01, 1.0)
        require_range(self, "penalty", 0.0)

    def build(self) -> Method:
        """The method that these settings describe."""
        pruning = Pruning(self.keep, self.penalty) if self.keep < 1 else None
        return Method(rule(self.weights, reweigh=by_product_norm), pruning=pruning, kinds=("lora", "dora", "hira"))


@dataclass(frozen=True)
class Flora(Averaging):
    """FLoRA: the exact mean goes into the base, and every round begins with a fresh adapter.

    `budget` bounds the rank of what has gone into the base (0: no bound, so nothing is lost).
    """

    budget: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_range(self, "budget", 0)

    def build(self) -> Method:
        """The method that these settings describe."""
        merge = rule(self.weights, restarted, missing=self.missing, gauge="free", whole=True, drifts=True)
        return Method(merge, kinds=("lora",), budget=self.budget)


@dataclass(frozen=True)
class FedEx(Averaging):
    """FedEx-LoRA: the mean of the factors, and what it misses of the exact mean goes into the base.

    `rank` bounds what one round adds (0: all that was missed, which is exact), `budget` what has been added.
    """

    rank: int = 0
    budget: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_range(self, "rank", 0)
        require_range(self, "budget", 0)

    def build(self) -> Method:
        """The method that these settings describe."""
        merge = rule(self.weights, with_residual(self.rank), missing=self.missing, whole=True, drifts=True)
        return Method(merge, kinds=("lora",), budget=self.budget)


@dataclass(frozen=True)
class FlexLora(Averaging):
    """FlexLoRA: the exact mean, cut to the server's rank by singular value decomposition.

    Where the server sees sums alone, it finds the mean from two of them; `sketch` is how many columns the first has
    (0: twice the server's rank and 8). The mean is exact where that is no less than the sum of the clients' ranks.
    """

    sketch: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_range(self, "sketch", 0, 1_000_000)

    def build(self) -> Method:
        """The method that these settings describe."""
        merge = rule(self.weights, truncated, missing=self.missing, gauge="free", whole=True)
        return Method(merge, kinds=SOLVED, sketch=self.sketch)


@dataclass(frozen=True)
class FfaLora(Weighted):
    """FFA-LoRA: A is frozen and the same everywhere, so the mean of B is exact."""

    def build(self) -> Method:
        """The method that these settings describe."""
        return Method(rule(self.weights), frozen=("*.A",), kinds=("lora", "dora", "hira"))


@dataclass(frozen=True)
class RoLora(Weighted):
    """RoLoRA: odd rounds train B, even rounds A; the mean of the one that is trained is exact."""

    def build(self) -> Method:
        """The method that these settings describe."""
        return Method(rule(self.weights), alternating=("*.B", "*.A"), kinds=("lora", "hira"))


@dataclass(frozen=True)
class FedSaLora(Weighted):
    """FedSA-LoRA: A is shared and averaged, B is trained and stays with its site."""

    def build(self) -> Method:
        """The method that these settings describe."""
        return Method(rule(self.weights, missing="covered"), local=("*.B",), kinds=("lora", "hira"))


@dataclass(frozen=True)
class FedSb(Weighted):
    """Fed-SB: B and A are one fixed basis, and a square R between them is trained; its mean is exact."""

    def build(self) -> Method:
        """The method that these settings describe."""
        return Method(rule(self.weights), kinds=("lora_sb",))


@dataclass(frozen=True)
class LoraFair(Averaging):
    """LoRA-FAIR: the mean of the factors, with B moved toward the exact mean; `strength` holds it back."""

    strength: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.strength > 0, "strength", expected="a number above 0", found=self.strength)

    def build(self) -> Method:
        """The method that these settings describe."""
        merge = rule(self.weights, corrected(self.strength), missing=self.missing, whole=True)
        return Method(merge, kinds=("lora", "dora", "hira"))
