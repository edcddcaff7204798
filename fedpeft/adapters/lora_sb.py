"""LoRA-SB: fixed low-rank factors beside a frozen weight, and a trained square matrix between them.

W + s B R A with A `(rank, in)` and B `(out, rank)` fixed, R `(rank, rank)` trained from zero, s = alpha / rank. With
W = U S Vᵀ, B is U S and A is Vᵀ of the leading `rank` singular values, so an untrained adapter changes nothing and
the gradient of R is s Bᵀ G Aᵀ, where G is that of the weight.

The server's factors travel to each node once; after that only R does. A node of smaller rank r holds the first r
rows of A and columns of B, which are the leading singular directions, and the leading corner of R.

Source: Ponkshe et al. 2024, "Initialization using Update Approximation is a Silver Bullet for Extremely Efficient
Low-Rank Fine-Tuning" (LoRA-SB); federated, Singhal et al. 2025, "Fed-SB". They take the factors, and R's first value,
from the gradient of the whole weight on rows of the training set. Here nobody but the nodes has such rows, the
server's own are held out for scoring, and a node that sent so large a gradient would give its rows away. So the
factors are those of LoRA-XS, Bałazy et al. 2024, "LoRA-XS: Low-Rank Adaptation with Extremely Small Number of
Parameters", section 3, which need no data; its R begins at random numbers of size 1e-5, here at zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from fedpeft.adapters.family import Family
from fedpeft.adapters.lora import lora


def lora_sb(*, rank: int, alpha: float, dropout: float, target_modules: Sequence[str], layers: Sequence[int]) -> Family:
    """The LoRA-SB family with these settings; empty sequences leave the choice to peft."""
    family = lora(
        rank=rank,
        alpha=alpha,
        dropout=dropout,
        rank_stabilised=False,
        target_modules=target_modules,
        layers=layers,
    )
    tensors = {"lora_A": "A", "lora_B.basis": "B", "lora_B.square": "R"}
    return replace(family, name="lora_sb", kind="lora_sb", tensors=tensors, folded="R")
