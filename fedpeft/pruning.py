"""Rank self-pruning: which ranks are the tail, what they weigh, and whether they go.

Source: HetLoRA, Cho et al. 2024, "Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models",
section 4.1.
"""

from __future__ import annotations

import math

import numpy as np

from fedpeft.adapters import AdapterSpec, Tensors, at_rank, greatest_rank, low_rank_modules
from fedpeft.merges import Pruning


def kept_rank(rank: int, pruning: Pruning) -> int:
    """The rank that a node of `rank` goes down to: at least one less, at least 1."""
    return max(1, min(rank - 1, math.floor(pruning.keep * rank)))


def tail(spec: AdapterSpec, tensors: Tensors, pruning: Pruning) -> float:
    """Σ ‖B[:, kept:]‖ ‖A[kept:]‖ over the low-rank modules."""
    found = 0.0
    for module in low_rank_modules(spec):
        kept = kept_rank(module.rank, pruning)
        b, a = tensors[f"{module.path}.B"][:, kept:], tensors[f"{module.path}.A"][kept:]
        found += float(np.linalg.norm(b)) * float(np.linalg.norm(a))
    return found


def pruned_spec(spec: AdapterSpec, before: Tensors, after: Tensors, pruning: Pruning | None) -> AdapterSpec:
    """`spec`, or, where training has made the tail smaller, `spec` without it."""
    if pruning is None or greatest_rank(spec) < 2 or tail(spec, after, pruning) >= tail(spec, before, pruning):
        return spec
    return at_rank(spec, kept_rank(greatest_rank(spec), pruning))
