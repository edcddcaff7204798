"""Settings of the adapter families, and the table of their names."""

from __future__ import annotations

from dataclasses import dataclass

from fedpeft.adapters import Family, head_only, ia3, lora, lora_sb, prompt_tuning
from fedpeft.config.fields import Table, require, require_range


@dataclass(frozen=True)
class Lora:
    """Low-rank adaptation; empty `target_modules` takes peft's choice for the model, empty `layers` all layers."""

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    rank_stabilised: bool = False
    target_modules: tuple[str, ...] = ()
    layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        require_range(self, "rank", 1)
        require(self.alpha > 0, "alpha", expected="a number above 0", found=self.alpha)
        require_range(self, "dropout", 0.0, 0.99)

    def build(self) -> Family:
        """The family that these settings describe."""
        return lora(
            rank=self.rank,
            alpha=self.alpha,
            dropout=self.dropout,
            rank_stabilised=self.rank_stabilised,
            target_modules=self.target_modules,
            layers=self.layers,
        )


@dataclass(frozen=True)
class LoraSb:
    """LoRA-SB: fixed factors of each weight and a trained square matrix between them, rank² numbers a module.

    Empty `target_modules` takes peft's choice for the model, empty `layers` all layers. Goes with the merge `fed_sb`.
    """

    rank: int = 32
    alpha: float = 32.0
    dropout: float = 0.0
    target_modules: tuple[str, ...] = ()
    layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        require_range(self, "rank", 1)
        require(self.alpha > 0, "alpha", expected="a number above 0", found=self.alpha)
        require_range(self, "dropout", 0.0, 0.99)

    def build(self) -> Family:
        """The family that these settings describe."""
        return lora_sb(
            rank=self.rank,
            alpha=self.alpha,
            dropout=self.dropout,
            target_modules=self.target_modules,
            layers=self.layers,
        )


@dataclass(frozen=True)
class Ia3:
    """Learned scales on keys, values and feed-forward activations."""

    target_modules: tuple[str, ...] = ()
    feedforward_modules: tuple[str, ...] = ()

    def build(self) -> Family:
        """The family that these settings describe."""
        return ia3(target_modules=self.target_modules, feedforward_modules=self.feedforward_modules)


@dataclass(frozen=True)
class PromptTuning:
    """Learned embeddings in front of the input."""

    virtual_tokens: int = 20

    def __post_init__(self) -> None:
        require_range(self, "virtual_tokens", 1)

    def build(self) -> Family:
        """The family that these settings describe."""
        return prompt_tuning(virtual_tokens=self.virtual_tokens)


@dataclass(frozen=True)
class HeadOnly:
    """No adapter: the base stays as it is and only the task's head learns."""

    def build(self) -> Family:
        """The family that these settings describe."""
        return head_only()


ADAPTERS = Table(
    "family",
    {"lora": Lora, "lora_sb": LoraSb, "ia3": Ia3, "prompt_tuning": PromptTuning, "head_only": HeadOnly},
)
