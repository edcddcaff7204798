"""Batched products come to what mapping a layer comes to, and are used where they can be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import nn
from torch.func import functional_call, vmap

from fedpeft.cohort_products import batched

CLIENTS, ROWS, TOKENS, IN, OUT = 3, 2, 4, 5, 6


class Net(nn.Module):
    """A linear layer, and one more that stays as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(IN, OUT)

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.inner(given)
        return made


def never(*_: Any, **__: Any) -> torch.Tensor:
    raise AssertionError("the layer was mapped")


def lora(**more: Any) -> nn.Module:
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=["inner"], **{"lora_dropout": 0.0, **more})
    layer: nn.Module = peft.get_peft_model(Net(), config).base_model.model.inner  # type: ignore[arg-type]
    return layer


def stacks(layer: nn.Module, trained: Callable[[str], bool]) -> dict[str, torch.Tensor]:
    found = {name: value for name, value in layer.named_parameters() if trained(name)}
    return {name: torch.randn(CLIENTS, *value.shape) for name, value in found.items()}


@pytest.mark.parametrize(
    ("layer", "trained"),
    [(lora(), lambda name: "lora_" in name), (nn.Linear(IN, OUT), lambda name: True)],
    ids=["lora", "linear"],
)
def test_all_clients_at_once_come_to_what_each_comes_to(layer: nn.Module, trained: Callable[[str], bool]) -> None:
    torch.manual_seed(0)
    own, given = stacks(layer, trained), torch.randn(CLIENTS * ROWS, TOKENS, IN)
    found = batched(layer, own, ROWS, never)(given)
    each = vmap(lambda numbers, rows: functional_call(layer, numbers, rows))(own, given.unflatten(0, (CLIENTS, ROWS)))
    torch.testing.assert_close(found, each.flatten(0, 1))


@pytest.mark.parametrize(
    ("layer", "kept"),
    [
        (lora(lora_dropout=0.5), "lora_"),
        (lora(use_dora=True), "lora_"),
        (lora(lora_bias=True), "lora_"),
        (lora(), "lora_B"),
        (lora(), ""),
        (nn.Linear(IN, OUT), "bias"),
        (nn.LayerNorm(IN), ""),
    ],
    ids=["dropout", "DoRA", "bias of B", "B alone", "base too", "bias alone", "another layer"],
)
def test_what_is_more_than_a_product_is_mapped(layer: nn.Module, kept: str) -> None:
    own = stacks(layer, lambda name: kept in name)
    assert batched(layer, own, ROWS, never) is never


def test_a_row_that_all_clients_share_is_mapped() -> None:
    layer = nn.Linear(IN, OUT)
    forward = batched(layer, stacks(layer, lambda name: True), ROWS, lambda *_: torch.zeros(1))
    assert forward(torch.randn(1, TOKENS, IN)).shape == (1,)


@pytest.mark.parametrize("change", ["disabled", "merged"])
def test_an_adapter_that_is_not_in_use_is_not_added(change: str) -> None:
    layer: Any = lora()
    own = stacks(layer, lambda name: "lora_" in name)
    layer.enable_adapters(False) if change == "disabled" else layer.merge()
    assert batched(layer, own, ROWS, never) is never
