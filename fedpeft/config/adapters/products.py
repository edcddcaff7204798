"""Settings of families whose change of the weight is a product of matrices other than LoRA's."""

from __future__ import annotations

from dataclasses import dataclass, replace

from fedpeft.adapters import Family, peft_family
from fedpeft.config.adapters.common import InLayers
from fedpeft.config.fields import require, require_range


@dataclass(frozen=True, kw_only=True)
class Scaled(InLayers):
    """Settings of a product that is multiplied by alpha over rank."""

    rank: int = 8
    alpha: float = 8.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_range(self, "rank", 1)
        require(self.alpha > 0, "alpha", expected="a number above 0", found=self.alpha)


@dataclass(frozen=True, kw_only=True)
class AdaLora(Scaled):
    """AdaLoRA's form: singular triplets, kept near orthogonal by a penalty of `orthogonality`.

    Every node holds all `rank` triplets: the budget is not reallocated, since masks that differ from node to node
    have no mean.

    Source: Zhang et al. 2023, "Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning", eq. 3 and 4.
    """

    alpha: float = 16.0
    dropout: float = 0.0
    orthogonality: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        require_range(self, "dropout", 0.0, 0.99)
        require_range(self, "orthogonality", 0.0)

    def build(self) -> Family:
        """The family that these settings describe."""
        arguments = {
            "init_r": self.rank,
            "target_r": self.rank,
            "lora_alpha": self.alpha,
            "lora_dropout": self.dropout,
            "orth_reg_weight": self.orthogonality or 1e-9,
            "total_step": 1 << 30,
            **self.common,
        }
        names = {"lora_A": "A", "lora_B": "B", "lora_E": "E"}
        return replace(peft_family("adalora", "ADALORA", names, **arguments), folded="E")


@dataclass(frozen=True, kw_only=True)
class LoHa(Scaled):
    """LoHa: two low-rank products multiplied number by number.

    Source: Hyeon-Woo et al. 2022, "FedPara: Low-Rank Hadamard Product for Communication-Efficient Federated Learning".
    """

    def build(self) -> Family:
        """The family that these settings describe."""
        names = {f"hada_{name}": name for name in ("w1_a", "w1_b", "w2_a", "w2_b")}
        arguments = {"r": self.rank, "alpha": self.alpha, **self.common}
        return replace(peft_family("loha", "LOHA", names, **arguments), folded="w2_b")


@dataclass(frozen=True, kw_only=True)
class LoKr(Scaled):
    """LoKr: a Kronecker product, of which the larger factor may be low-rank.

    Source: Yeh et al. 2024, "Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation".
    """

    def build(self) -> Family:
        """The family that these settings describe."""
        names = {f"lokr_{name}": name for name in ("w1", "w2", "w2_a", "w2_b")}
        arguments = {"r": self.rank, "alpha": self.alpha, **self.common}
        return replace(peft_family("lokr", "LOKR", names, **arguments), folded="w1")


@dataclass(frozen=True, kw_only=True)
class HiRa(InLayers):
    """HiRA: the weight is changed by itself times a low-rank product, number by number.

    Source: Huang et al. 2025, "HiRA: Parameter-Efficient Hadamard High-Rank Adaptation for Large Language Models".
    """

    rank: int = 32
    dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_range(self, "rank", 1)
        require_range(self, "dropout", 0.0, 0.99)

    def build(self) -> Family:
        """The family that these settings describe."""
        names = {"hira_A": "A", "hira_B": "B", "hira_embedding_A": "A", "hira_embedding_B": "B"}
        arguments = {"r": self.rank, "hira_dropout": self.dropout, **self.common}
        return replace(peft_family("hira", "HIRA", names, **arguments), ranked="A")
