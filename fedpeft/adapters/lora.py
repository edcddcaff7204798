"""LoRA: a trainable low-rank product beside a frozen weight.

W + s B A with A `(rank, in)`, B `(out, rank)`, s = alpha / rank (alpha / sqrt(rank) when rank-stabilised).

Source: Hu et al. 2021, "LoRA", eq. 3; Kalajdzievski 2023, "rsLoRA", eq. 4.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fedpeft.adapters.family import Family


def lora(
    *,
    rank: int,
    alpha: float,
    dropout: float,
    rank_stabilised: bool,
    target_modules: Sequence[str],
    layers: Sequence[int],
    dora: bool = False,
    freeze_a: bool = False,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
) -> Family:
    """The LoRA family with these settings; empty sequences leave the choice to peft.

    With `dora` rows of the weight are rescaled too; with `freeze_a` A stays as it was drawn.
    """
    peft = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "use_rslora": rank_stabilised,
        "target_modules": "all-linear" if tuple(target_modules) == ("all-linear",) else list(target_modules) or None,
        "layers_to_transform": list(layers) or None,
    }
    told = {"use_dora": dora, "rank_pattern": dict(rank_pattern or {}), "alpha_pattern": dict(alpha_pattern or {})}
    tensors = {"lora_A": "A", "lora_B": "B", "lora_embedding_A": "A", "lora_embedding_B": "B"}
    arguments = {**peft, **{key: value for key, value in told.items() if value}}
    if dora:
        return Family("lora", "dora", arguments, {**tensors, "lora_magnitude_vector": "m"}, ranked="A")
    return Family("lora", "lora_fa" if freeze_a else "lora", arguments, tensors, folded="B", ranked="A")
