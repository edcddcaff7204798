"""Layers of several clients as batched matrix products, in place of a layer that is mapped over them.

The same numbers come out as under `vmap`, but for the rounding of sums. Mapping a layer takes about a millisecond each
time, whatever it holds, which small batches feel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import nn

Numbers = Mapping[str, torch.Tensor]
"""What a layer holds of the clients' own, `(clients, *shape)`, by name."""

Forward = Callable[..., Any]


def batched(layer: nn.Module, own: Numbers, rows: int, otherwise: Forward) -> Forward:
    """What computes `layer` for clients that hold `own` of it; `otherwise` where there is no such way.

    `rows` of each client stand one below the other.
    """
    made = _KINDS[type(layer)](layer, own) if type(layer) in _KINDS else None
    if made is None:
        return otherwise
    clients, compute = len(next(iter(own.values()))), made

    def forward(*given: Any, **named: Any) -> Any:
        if named or len(given) != 1 or given[0].ndim < 2 or len(given[0]) != clients * rows:
            return otherwise(*given, **named)
        return compute(given[0])

    return forward


def _lora(layer: Any, own: Numbers) -> Forward | None:
    """W x + s B A x, where clients have both factors of one adapter of no variant, without dropout or bias."""
    name = layer.active_adapters[0]
    plain = (
        len(layer.active_adapters) == 1
        and name in layer.lora_A
        and name not in layer.lora_variant
        and not (layer.merged or layer.disable_adapters or layer.lora_bias[name])
        and isinstance(layer.lora_dropout[name], nn.Identity)
    )
    if not plain or own.keys() != {f"lora_A.{name}.weight", f"lora_B.{name}.weight"}:
        return None
    down, up = own[f"lora_A.{name}.weight"].mT, own[f"lora_B.{name}.weight"].mT

    def forward(given: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = layer.base_layer(given)
        moved = _client_by_client(layer._cast_input_dtype(given, down.dtype), down) @ up
        total: torch.Tensor = made + moved.view(made.shape) * layer.scaling[name]
        return total.to(made.dtype)

    return forward


def _linear(layer: Any, own: Numbers) -> Forward | None:
    """W x + b, where clients have both."""
    if own.keys() != {"weight", "bias"}:
        return None
    weight, bias = own["weight"].mT, own["bias"].unsqueeze(1)

    def forward(given: torch.Tensor) -> torch.Tensor:
        made = _client_by_client(given, weight) + bias
        return made.view(*given.shape[:-1], layer.out_features)

    return forward


def _client_by_client(given: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """`(clients, rows, out)` of rows that stand client by client, and `(clients, in, out)`."""
    return given.reshape(len(numbers), -1, given.shape[-1]) @ numbers


_KINDS: Mapping[type[nn.Module], Callable[[Any, Numbers], Forward | None]] = {LoraLinear: _lora, nn.Linear: _linear}
