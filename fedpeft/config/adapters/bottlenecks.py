"""Settings of layers of our own: bottlenecks beside or behind sub-layers, and scaled and shifted features."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from fedpeft.adapters import Family, own_family
from fedpeft.config.adapters.common import ADDITIVE
from fedpeft.config.fields import require, require_range


@dataclass(frozen=True, kw_only=True)
class Bottleneck:
    """A small network of `size` hidden units; `target_modules` none takes the method's own choice for the model."""

    group: ClassVar[str] = ADDITIVE
    size: int = 16
    activation: str = "relu"
    target_modules: tuple[str, ...] = ()
    layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        require_range(self, "size", 1)
        known = ("relu", "gelu", "silu")
        require(self.activation in known, "activation", expected=f"one of {', '.join(known)}", found=self.activation)

    @property
    def common(self) -> dict[str, Any]:
        """What the layers are told."""
        where = {"target_modules": self.target_modules, "layers": self.layers}
        return {"bottleneck": self.size, "activation": self.activation, **where}


@dataclass(frozen=True, kw_only=True)
class Houlsby(Bottleneck):
    """A bottleneck behind attention and one behind the feed-forward network.

    Source: Houlsby et al. 2019, "Parameter-Efficient Transfer Learning for NLP", section 2.
    """

    def build(self) -> Family:
        """The family that these settings describe."""
        return own_family("houlsby", **self.common)


@dataclass(frozen=True, kw_only=True)
class Pfeiffer(Bottleneck):
    """A bottleneck behind the feed-forward network.

    Source: Pfeiffer et al. 2021, "AdapterFusion: Non-Destructive Task Composition for Transfer Learning", section 3.1.
    """

    def build(self) -> Family:
        """The family that these settings describe."""
        return own_family("pfeiffer", **self.common)


@dataclass(frozen=True, kw_only=True)
class ParallelAdapter(Bottleneck):
    """A bottleneck beside the feed-forward network, times `scale`; with 0.1 on a vision transformer, AdaptFormer.

    Source: He et al. 2022, "Towards a Unified View of Parameter-Efficient Transfer Learning", section 3; Chen et al.
    2022, "AdaptFormer: Adapting Vision Transformers for Scalable Visual Recognition", eq. 4.
    """

    scale: float = 4.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.scale > 0, "scale", expected="a number above 0", found=self.scale)

    def build(self) -> Family:
        """The family that these settings describe."""
        return own_family("parallel", scale=self.scale, **self.common)


@dataclass(frozen=True, kw_only=True)
class Ssf:
    """SSF: what sub-layers give is scaled and shifted.

    Source: Lian et al. 2022, "Scaling & Shifting Your Features: A New Baseline for Efficient Model Tuning", eq. 3.
    """

    group: ClassVar[str] = ADDITIVE
    target_modules: tuple[str, ...] = ()
    layers: tuple[int, ...] = ()

    def build(self) -> Family:
        """The family that these settings describe."""
        return own_family("ssf", target_modules=self.target_modules, layers=self.layers)
