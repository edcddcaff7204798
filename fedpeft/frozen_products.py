"""The products of a frozen base's matrices by oneDNN, where torch's own take longer.

Torch hands float32 products to the BLAS that it was built with. That may be MKL, which on processors that are not
Intel's leaves wide vectors unused; oneDNN, which torch has with it too, uses what the processor has. The same numbers
come out but for the rounding of sums.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from fedpeft.replacing import replaced


@contextlib.contextmanager
def by_onednn(model: nn.Module, own: Collection[int]) -> Iterator[None]:
    """Inside, `model`'s linear layers with float32 weights on a CPU compute by oneDNN, forward and backward.

    Layers with a parameter whose id is in `own`, and those of other kinds, compute as ever; so does everything where
    torch was built without oneDNN.
    """
    with contextlib.ExitStack() as undone:
        for module in model.modules() if is_there() else ():
            if type(module) is nn.Linear and _serves(module, own):
                undone.enter_context(replaced(module, "forward", partial(_linear, module, module.forward)))
        yield


def is_there() -> bool:
    """Whether torch was built with oneDNN."""
    return bool(torch._C._has_mkldnn) and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _serves(module: nn.Linear, own: Collection[int]) -> bool:
    parameters = list(module.parameters(recurse=False))
    still = not any(id(one) in own or one.requires_grad for one in parameters)
    return still and all(one.dtype == torch.float32 and one.device.type == "cpu" for one in parameters)


def _linear(module: nn.Linear, compute: Callable[..., Any], given: torch.Tensor) -> Any:
    plain = given.dtype != torch.float32 or given.ndim < 2 or given.numel() == 0
    if plain or torch.is_autocast_enabled("cpu") or torch._C._functorch.is_batchedtensor(given):
        return compute(given)
    made: Any = _Product.apply(given.flatten(0, -2), module.weight, module.bias)  # type: ignore[no-untyped-call]
    return made.unflatten(0, given.shape[:-1])  # a view of what it gave, which may be added to in place


class _Product(torch.autograd.Function):
    """x Wᵀ + b for a W and a b that stand still."""

    @staticmethod
    def forward(ctx: Any, given: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """`(rows, in)` to `(rows, out)`."""
        ctx.save_for_backward(weight)
        return product(given, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        """The gradient of x alone."""
        (weight,) = ctx.saved_tensors
        return product(gradient, weight.t(), None), None, None


def product(given: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """X Wᵀ + b by oneDNN, of `(rows, in)` and `(out, in)`."""
    made: torch.Tensor = torch.ops.mkldnn._linear_pointwise(given, weight, bias, "none", [], "")
    return made
