"""Settings of families that put learned vectors before what a model reads, in its input or in its layers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from fedpeft.adapters import Family, own_family, peft_family, prompt_tuning
from fedpeft.config.adapters.common import ADDITIVE
from fedpeft.config.fields import require_range

_PREFIX = "base_model."
_NAMES = {"prompt_encoder": "embedding"}


@dataclass(frozen=True)
class PromptTuning:
    """Learned embeddings in front of the input."""

    group: ClassVar[str] = ADDITIVE
    virtual_tokens: int = 20

    def __post_init__(self) -> None:
        require_range(self, "virtual_tokens", 1)

    def build(self) -> Family:
        """The family that these settings describe."""
        return prompt_tuning(virtual_tokens=self.virtual_tokens)


@dataclass(frozen=True, kw_only=True)
class PrefixTuning:
    """Learned keys and values in every layer; with `hidden` above 0 a network of that width makes them while training.

    Source: Li and Liang 2021, "Prefix-Tuning: Optimizing Continuous Prompts for Generation", section 4.
    """

    group: ClassVar[str] = ADDITIVE
    virtual_tokens: int = 20
    hidden: int = 0

    def __post_init__(self) -> None:
        require_range(self, "virtual_tokens", 1)
        require_range(self, "hidden", 0)

    def build(self) -> Family:
        """The family that these settings describe."""
        projected = {"prefix_projection": True, "encoder_hidden_size": self.hidden} if self.hidden else {}
        arguments = {"num_virtual_tokens": self.virtual_tokens, **projected}
        family = peft_family(
            "prefix_tuning", "PREFIX_TUNING", _NAMES, "encoded" if self.hidden else "prompt", **arguments
        )
        return replace(family, prefix=_PREFIX)


@dataclass(frozen=True, kw_only=True)
class PTuning:
    """Learned embeddings in front of the input, made by a network of width `hidden` while training.

    Source: Liu et al. 2021, "GPT Understands, Too", section 3.2.
    """

    group: ClassVar[str] = ADDITIVE
    virtual_tokens: int = 20
    hidden: int = 128

    def __post_init__(self) -> None:
        require_range(self, "virtual_tokens", 1)
        require_range(self, "hidden", 1)

    def build(self) -> Family:
        """The family that these settings describe."""
        arguments = {"num_virtual_tokens": self.virtual_tokens, "encoder_hidden_size": self.hidden}
        return replace(peft_family("p_tuning", "P_TUNING", _NAMES, "encoded", **arguments), prefix=_PREFIX)


@dataclass(frozen=True, kw_only=True)
class VisualPrompt:
    """Learned vectors before the patches of an image (VPT-shallow).

    Source: Jia et al. 2022, "Visual Prompt Tuning", section 3.2.
    """

    group: ClassVar[str] = ADDITIVE
    virtual_tokens: int = 10

    def __post_init__(self) -> None:
        require_range(self, "virtual_tokens", 1)

    def build(self) -> Family:
        """The family that these settings describe."""
        return own_family("visual_prompt", tokens=self.virtual_tokens)


@dataclass(frozen=True, kw_only=True)
class LlamaAdapter:
    """LLaMA-Adapter: gated attention to learned vectors in the last `layers` layers.

    Source: Zhang et al. 2024, "LLaMA-Adapter: Efficient Fine-tuning of Language Models with Zero-init Attention".
    """

    group: ClassVar[str] = ADDITIVE
    virtual_tokens: int = 10
    layers: int = 2

    def __post_init__(self) -> None:
        require_range(self, "virtual_tokens", 1)
        require_range(self, "layers", 1)

    def build(self) -> Family:
        """The family that these settings describe."""
        return peft_family(
            "llama_adapter",
            "ADAPTION_PROMPT",
            {"adaption_prompt": "prompt", "adaption_gate": "gate"},
            adapter_len=self.virtual_tokens,
            adapter_layers=self.layers,
        )
