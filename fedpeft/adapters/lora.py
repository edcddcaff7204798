"""LoRA: a trainable low-rank product beside a frozen weight.

W + s B A with A `(rank, in)`, B `(out, rank)`, s = alpha / rank (alpha / sqrt(rank) when rank-stabilised).

Source: Hu et al. 2021, "LoRA", eq. 3; Kalajdzievski 2023, "rsLoRA", eq. 4.
"""

from __future__ import annotations

from collections.abc import Sequence

from fedpeft.adapters.family import Family


def lora(
    *,
    rank: int,
    alpha: float,
    dropout: float,
    rank_stabilised: bool,
    target_modules: Sequence[str],
    layers: Sequence[int],
) -> Family:
    """The LoRA family with these settings; empty sequences leave the choice to peft."""
    peft = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "use_rslora": rank_stabilised,
        "target_modules": list(target_modules) or None,
        "layers_to_transform": list(layers) or None,
    }
    tensors = {"lora_A": "A", "lora_B": "B", "lora_embedding_A": "A", "lora_embedding_B": "B"}
    return Family("lora", "lora", peft, tensors, folded="B", ranked="A")
