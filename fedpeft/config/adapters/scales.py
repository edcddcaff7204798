"""Settings of families that train scales, norms, biases, rows of the embedding, or the head alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fedpeft.adapters import Family, head_only, ia3, own_family, peft_family
from fedpeft.config.adapters.common import ADDITIVE, SELECTIVE, Everywhere
from fedpeft.config.fields import require


@dataclass(frozen=True)
class Ia3:
    """Learned scales on keys, values and feed-forward activations."""

    group: ClassVar[str] = ADDITIVE
    target_modules: tuple[str, ...] = ()
    feedforward_modules: tuple[str, ...] = ()

    def build(self) -> Family:
        """The family that these settings describe."""
        return ia3(target_modules=self.target_modules, feedforward_modules=self.feedforward_modules)


@dataclass(frozen=True, kw_only=True)
class LnTuning(Everywhere):
    """LayerNorm tuning: the norms' weights and biases are trained.

    Source: Zhao et al. 2024, "Tuning LayerNorm in Attention: Towards Efficient Multi-Modal LLM Finetuning".
    """

    group: ClassVar[str] = SELECTIVE

    def build(self) -> Family:
        """The family that these settings describe."""
        names = {"ln_tuning_layers.weight": "weight", "ln_tuning_layers.bias": "bias"}
        return peft_family("ln_tuning", "LN_TUNING", names, "layer_norm", **self.common)


@dataclass(frozen=True, kw_only=True)
class TrainableTokens(Everywhere):
    """Rows of the token embedding are trained, those of the indices `tokens`."""

    group: ClassVar[str] = SELECTIVE
    tokens: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            bool(self.tokens) and min(self.tokens) >= 0 and len(set(self.tokens)) == len(self.tokens),
            "tokens",
            expected="distinct indices of tokens, one at least",
            found=self.tokens,
        )

    def build(self) -> Family:
        """The family that these settings describe."""
        names = {"trainable_tokens_delta": "rows"}
        arguments = {"token_indices": list(self.tokens), **self.common}
        return peft_family("trainable_tokens", "TRAINABLE_TOKENS", names, "tokens", **arguments)


@dataclass(frozen=True, kw_only=True)
class BitFit:
    """BitFit: the base's biases are trained, those that match one of the patterns `biases` (none: all).

    Source: Ben Zaken et al. 2022, "BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked
    Language-models".
    """

    group: ClassVar[str] = SELECTIVE
    biases: tuple[str, ...] = ()

    def build(self) -> Family:
        """The family that these settings describe."""
        return own_family("bitfit", **({"biases": self.biases} if self.biases else {}))


@dataclass(frozen=True)
class HeadOnly:
    """No adapter: the base stays as it is and only the task's head learns."""

    group: ClassVar[str] = SELECTIVE

    def build(self) -> Family:
        """The family that these settings describe."""
        return head_only()
