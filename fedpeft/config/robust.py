"""Settings of the merges that withstand hostile updates."""

from __future__ import annotations

from dataclasses import dataclass

from fedpeft.config.averages import Weighted
from fedpeft.config.fields import require, require_range
from fedpeft.merges import SPACES, Method, coordinatewise, judged
from fedpeft.merges.robust import (
    bulyan_mean,
    bulyan_selection,
    coordinate_median,
    geometric_median,
    krum,
    multi_krum,
    norm_bound,
    trimmed_mean,
)


@dataclass(frozen=True)
class Median(Weighted):
    """At each number the median of the clients' deltas."""

    def build(self) -> Method:
        """The method that these settings describe."""
        return Method(coordinatewise(coordinate_median(), self.weights))


@dataclass(frozen=True)
class TrimmedMean(Weighted):
    """At each number the mean without the `trimmed` greatest and as many least."""

    trimmed: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        require_range(self, "trimmed", 0)

    def build(self) -> Method:
        """The method that these settings describe."""
        return Method(coordinatewise(trimmed_mean(self.trimmed), self.weights))


@dataclass(frozen=True)
class Bulyan(Weighted):
    """Krum again and again, then the mean of the numbers nearest to their median; against `byzantine` attackers."""

    byzantine: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        require_range(self, "byzantine", 1)

    def build(self) -> Method:
        """The method that these settings describe."""
        chosen = bulyan_selection(self.byzantine)
        return Method(coordinatewise(bulyan_mean(self.byzantine), self.weights, chosen))


@dataclass(frozen=True)
class Judged(Weighted):
    """What rules have that judge whole updates: by their `factors`, or by the `products` that these make."""

    space: str = "products"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.space in SPACES, "space", expected=f"one of {', '.join(SPACES)}", found=self.space)


@dataclass(frozen=True)
class Krum(Judged):
    """The update that is nearest to its neighbours, where `byzantine` of them may lie."""

    byzantine: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        require_range(self, "byzantine", 1)

    def build(self) -> Method:
        """The method that these settings describe."""
        return Method(judged(krum(self.byzantine), self.weights, self.space))


@dataclass(frozen=True)
class MultiKrum(Krum):
    """The mean of the `kept` updates that Krum likes best (0: all but `byzantine`)."""

    kept: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_range(self, "kept", 0)

    def build(self) -> Method:
        """The method that these settings describe."""
        return Method(judged(multi_krum(self.byzantine, self.kept), self.weights, self.space))


@dataclass(frozen=True)
class GeometricMedian(Judged):
    """RFA: the point of least summed distance to the updates, by smoothed Weiszfeld steps."""

    iterations: int = 10_000

    def __post_init__(self) -> None:
        super().__post_init__()
        require_range(self, "iterations", 1)

    def build(self) -> Method:
        """The method that these settings describe."""
        return Method(judged(geometric_median(self.iterations), self.weights, self.space))


@dataclass(frozen=True)
class NormBound(Judged):
    """The mean of updates cut to the norm `limit` (0: the median of the round's norms)."""

    limit: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_range(self, "limit", 0.0)

    def build(self) -> Method:
        """The method that these settings describe."""
        return Method(judged(norm_bound(self.limit), self.weights, self.space))
