"""What a family adds to the loss of a task."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from fedpeft.adapters import Family


def of(model: nn.Module, family: Family) -> Callable[[], torch.Tensor] | None:
    """The penalty that `family` puts on its tensors in `model`, a scalar, if it has one."""
    make = _PENALTIES.get(family.kind)
    return make(model, family) if make else None


def _orthogonality(model: nn.Module, family: Family) -> Callable[[], torch.Tensor] | None:
    """The mean of ‖A Aᵀ − I‖_F and ‖Bᵀ B − I‖_F over the factors, times a weight.

    peft adds this only where the model computes the loss itself, from labels, and for tasks that it knows.

    Source: Zhang et al. 2023, "Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning", eq. 4.
    """
    weight = float(family.peft["orth_reg_weight"])
    layers: list[Any] = [layer for layer in model.modules() if hasattr(layer, "lora_E")]

    def penalty() -> torch.Tensor:
        grams = [a @ a.T for layer in layers for a in (layer.lora_A["default"], layer.lora_B["default"].T)]
        gaps = [torch.linalg.norm(gram - torch.eye(len(gram), device=gram.device)) for gram in grams]
        return weight * torch.stack(gaps).mean()

    return penalty if weight > 1e-8 else None


_PENALTIES: Mapping[str, Callable[[nn.Module, Family], Callable[[], torch.Tensor] | None]] = {"adalora": _orthogonality}
"""The kinds of modules that come with a penalty."""
