"""Settings of families that rotate or reflect what a weight reads or gives."""

from __future__ import annotations

from dataclasses import dataclass

from fedpeft.adapters import Family, peft_family
from fedpeft.config.adapters.common import Everywhere, InLayers
from fedpeft.config.fields import require, require_range


@dataclass(frozen=True, kw_only=True)
class Oft(InLayers):
    """OFT: blocks of the input are rotated by the Cayley transform of trained skew matrices.

    Source: Qiu et al. 2023, "Controlling Text-to-Image Diffusion by Orthogonal Finetuning", section 3.3.
    """

    block_size: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        require_range(self, "block_size", 2)

    def build(self) -> Family:
        """The family that these settings describe."""
        # The two ways to compute the Cayley transform that peft has give R and its transpose: one is pinned.
        arguments = {"r": 0, "oft_block_size": self.block_size, "use_cayley_neumann": True, **self.common}
        return peft_family("oft", "OFT", {"oft_R": "skew"}, **arguments)


@dataclass(frozen=True, kw_only=True)
class Boft(InLayers):
    """BOFT: `factors` butterfly factors, each of rotated blocks.

    Source: Liu et al. 2024, "Parameter-Efficient Orthogonal Finetuning via Butterfly Factorization", section 4.
    """

    block_size: int = 4
    factors: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        require_range(self, "block_size", 2)
        require_range(self, "factors", 1)

    def build(self) -> Family:
        """The family that these settings describe."""
        arguments = {"boft_block_size": self.block_size, "boft_n_butterfly_factor": self.factors, **self.common}
        return peft_family("boft", "BOFT", {"boft_R": "skew", "boft_s": "scale"}, **arguments)


@dataclass(frozen=True, kw_only=True)
class Hra(InLayers):
    """HRA: a chain of `rank` Householder reflections.

    Source: Yuan et al. 2024, "Bridging The Gap between Low-rank and Orthogonal Adaptation via Householder Reflection
    Adaptation", eq. 3.
    """

    rank: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        require_range(self, "rank", 2)
        require(
            self.rank % 2 == 0, "rank", expected="an even number, so that the chain begins as nothing", found=self.rank
        )

    def build(self) -> Family:
        """The family that these settings describe."""
        return peft_family("hra", "HRA", {"hra_u": "u"}, **{"r": self.rank, **self.common})


@dataclass(frozen=True, kw_only=True)
class Road(Everywhere):
    """RoAd: pairs of outputs are rotated and scaled; `variant` is road_1, road_2 or road_4.

    Source: Liao and Monz 2024, "3-in-1: 2D Rotary Adaptation for Efficient Finetuning, Efficient Batching and
    Composability", section 3.
    """

    variant: str = "road_1"
    group_size: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        known = ("road_1", "road_2", "road_4")
        require(self.variant in known, "variant", expected=f"one of {', '.join(known)}", found=self.variant)
        require_range(self, "group_size", 2)

    def build(self) -> Family:
        """The family that these settings describe."""
        arguments = {"variant": self.variant, "group_size": self.group_size, **self.common}
        return peft_family("road", "ROAD", {"road_theta": "theta", "road_alpha": "alpha"}, **arguments)
