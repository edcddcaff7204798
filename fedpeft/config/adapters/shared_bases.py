"""Settings of families that train few numbers between matrices that are frozen, and the same on every node."""

from __future__ import annotations

from dataclasses import dataclass

from fedpeft.adapters import Family, peft_family
from fedpeft.config.adapters.common import Everywhere, InLayers
from fedpeft.config.fields import require, require_range


@dataclass(frozen=True, kw_only=True)
class Vera(InLayers):
    """VeRA: two vectors between random matrices that all modules share; with `freeze_d` one of them stays.

    Source: Kopiczko et al. 2024, "VeRA: Vector-based Random Matrix Adaptation", eq. 2.
    """

    rank: int = 256
    d_initial: float = 0.1
    freeze_d: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require_range(self, "rank", 1)

    def build(self) -> Family:
        """The family that these settings describe."""
        return peft_family(
            "vera",
            "VERA",
            {"vera_lambda_b": "b", "vera_lambda_d": "d"},
            "vera_b" if self.freeze_d else "vera",
            **{"r": self.rank, "d_initial": self.d_initial, "save_projection": False, **self.common},
        )


@dataclass(frozen=True, kw_only=True)
class RandLora(InLayers):
    """RandLoRA: a sum of random products of full rank, each scaled by two trained vectors.

    Source: Albert et al. 2025, "RandLoRA: Full-rank parameter-efficient fine-tuning of large models", eq. 3.
    """

    rank: int = 32
    alpha: int = 640

    def __post_init__(self) -> None:
        super().__post_init__()
        require_range(self, "rank", 1)
        require_range(self, "alpha", 1)

    def build(self) -> Family:
        """The family that these settings describe."""
        return peft_family(
            "randlora",
            "RANDLORA",
            {"randlora_lambda": "lambda", "randlora_gamma": "gamma"},
            **{"r": self.rank, "randlora_alpha": self.alpha, "save_projection": False, **self.common},
        )


@dataclass(frozen=True, kw_only=True)
class TinyLora(InLayers):
    """TinyLoRA: `numbers` trained numbers a module, projected between its leading singular vectors.

    With `weight_tying` above 0 modules share them, up to 1 where all do.

    Source: arXiv 2602.04118, "Learning to Reason in 13 Parameters", as peft has it.
    """

    rank: int = 2
    numbers: int = 64
    weight_tying: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_range(self, "rank", 1)
        require_range(self, "numbers", 1)
        require_range(self, "weight_tying", 0.0, 1.0)

    def build(self) -> Family:
        """The family that these settings describe."""
        return peft_family(
            "tinylora",
            "TINYLORA",
            {"tinylora_v": "v"},
            **{"r": self.rank, "u": self.numbers, "weight_tying": self.weight_tying, **self.common},
        )


@dataclass(frozen=True, kw_only=True)
class Frod(InLayers):
    """FRoD: a diagonal and a few sparse numbers between rotations that modules of one kind share, as peft has it."""

    sparse_rate: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 < self.sparse_rate <= 1, "sparse_rate", expected="above 0, up to 1", found=self.sparse_rate)

    def build(self) -> Family:
        """The family that these settings describe."""
        return peft_family(
            "frod",
            "FROD",
            {"frod_lambda_l": "diagonal", "frod_lambda_s_values": "sparse"},
            **{"sparse_rate": self.sparse_rate, "save_projection": False, "progressbar": False, **self.common},
        )


@dataclass(frozen=True, kw_only=True)
class Shira(Everywhere):
    """SHiRA: a few entries of the weight itself, as many as a LoRA of `rank` has, at places drawn from `places_seed`.

    Source: Bhardwaj et al. 2024, "Sparse High Rank Adapters", section 3.
    """

    rank: int = 32
    places_seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_range(self, "rank", 1)
        require_range(self, "places_seed", 0)

    def build(self) -> Family:
        """The family that these settings describe."""
        return peft_family(
            "shira",
            "SHIRA",
            {"shira_weight": "weight"},
            **{"r": self.rank, "random_seed": self.places_seed, **self.common},
        )
