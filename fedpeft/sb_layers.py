"""LoRA-SB on peft's linear layers: factors of the frozen weight that stay as they are, a square matrix between them."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import Linear
from torch import nn
from torch.nn.functional import linear

from fedpeft.adapters import Family
from fedpeft.errors import ModelError, sentence

_SPARE = 16
"""Directions that are sought beside those that are kept."""

_ITERATIONS = 8
"""Passes over the weight and its transpose, of which each parts neighbouring singular values further."""


def rebuild(model: nn.Module, family: Family) -> None:
    """The LoRA layers in `model` compute W x + s B R A x from now on, with R = 0 at first.

    Whatever `requires_grad` says, no gradient reaches A and B. What a layer saves is the LoRA of B R and A. The
    factors are drawn from torch's global generator: see `factors_of`.

    Raises:
        ModelError: an adapted module is not linear, or has a side below the rank.
    """
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            path, rank = name.removeprefix(family.prefix), layer.r["default"]
            weight = _weight(layer, path, family)
            if rank > min(weight.shape):
                raise ModelError(
                    sentence(
                        f"adapter.{family.name}.rank",
                        expected=f"at most {min(weight.shape)}, the smaller side of {path}",
                        found=rank,
                        remedy="lower it",
                    )
                )
            a, b = factors_of(weight, rank)
            layer.lora_A["default"], layer.lora_B["default"] = _Fixed(a), _Squared(b)


def factors_of(weight: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A = Vᵀ `(rank, in)` and B = U S `(out, rank)` of the leading singular values of a weight `(out, in)`, float32.

    Rows of A are orthonormal. Exact to rounding where the weight's smaller side is at most `rank` + 16; else
    singular values that lie close together at the cut may be mixed. The subspace is drawn from torch's global
    generator.

    Source: Halko et al. 2011, "Finding Structure with Randomness", algorithms 4.4 and 5.1.
    """
    with torch.no_grad():
        u, values, v = torch.svd_lowrank(weight.float(), q=min(rank + _SPARE, *weight.shape), niter=_ITERATIONS)
        return v[:, :rank].T.contiguous(), u[:, :rank] * values[:rank]


class _Fixed(nn.Module):
    """x ↦ A x, with `weight` A `(rank, in)`."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight.detach())


class _Squared(nn.Module):
    """x ↦ B R x, with `basis` B `(out, rank)` and `square` R `(rank, rank)`; peft reads `weight`, their product."""

    def __init__(self, basis: torch.Tensor) -> None:
        super().__init__()
        self.basis = nn.Parameter(basis)
        self.square = nn.Parameter(basis.new_zeros(basis.shape[1], basis.shape[1]))

    @property
    def weight(self) -> torch.Tensor:
        return self.basis.detach() @ self.square

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # By the product, as stock LoRA computes, so that what is saved gives the same logits to the bit.
        return linear(x, self.weight)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        weight = self.weight
        destination[f"{prefix}weight"] = weight if keep_vars else weight.detach()


def _weight(layer: LoraLayer, path: str, family: Family) -> torch.Tensor:
    """The frozen weight beside which a layer stands, `(out, in)`."""
    if type(layer) is not Linear:
        raise ModelError(
            sentence(
                f"adapter.{family.name}.target_modules",
                expected="linear layers",
                found=f"{type(layer.get_base_layer()).__name__} at {path}",
                remedy="name others",
            )
        )
    base: Any = layer.get_base_layer()
    weight: torch.Tensor = base.weight
    return weight.T if layer.fan_in_fan_out else weight
