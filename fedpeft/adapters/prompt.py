"""Prompt tuning: learned embeddings in front of the input.

Source: Lester et al. 2021, "The Power of Scale for Parameter-Efficient Prompt Tuning", section 2.
"""

from __future__ import annotations

from fedpeft.adapters.family import Family


def prompt_tuning(*, virtual_tokens: int) -> Family:
    """The prompt-tuning family with `virtual_tokens` embeddings, `(virtual_tokens, hidden)`."""
    peft = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": virtual_tokens}
    return Family("prompt_tuning", "prompt", peft, {"prompt_encoder": "embedding"}, prefix="base_model.")
