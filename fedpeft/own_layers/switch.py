"""A model without its adapters, for as long as a block of code runs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import peft
from torch import nn

from fedpeft.own_layers.layers import FIRST, OwnLayer, claims, own_layers
from fedpeft.own_layers.masks import Mask, masks

_OFF = "fedpeft_off"
"""The mark on a module of the base whose parameters have the base's first values for now."""


@contextlib.contextmanager
def switched_off(model: nn.Module) -> Iterator[None]:
    """Inside, `model` computes as if no method of ours were installed, and after it as before.

    Blocks may be nested. A backward pass belongs in the block that its forward pass was in.
    """
    every: list[OwnLayer | Mask] = [*own_layers(model).values(), *masks(model)]
    layers = [layer for layer in every if not layer.off]
    claimed = [(module, name) for module, name in claims(model) if _OFF not in module.__dict__]
    for layer in layers:
        layer.off = True
    for module, name in claimed:
        _exchange(module, name)
        module.__dict__[_OFF] = True
    try:
        yield
    finally:
        for layer in layers:
            layer.off = False
        for module, name in claimed:
            _exchange(module, name)
            module.__dict__.pop(_OFF, None)


@contextlib.contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Inside, `model` computes with neither a method of ours nor an adapter of peft's, and after it as before."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(switched_off(model))
        if isinstance(model, peft.PeftModel):
            stack.enter_context(_unadapted(model))
        yield


def _unadapted(model: Any) -> contextlib.AbstractContextManager[None]:
    """Peft's own way, which for a prompt asks for a method that only generating models have."""
    prompted = model.peft_config[model.active_adapter].is_prompt_learning
    if prompted and not hasattr(model, "prepare_inputs_for_generation"):
        return _unprompted(model)
    way: contextlib.AbstractContextManager[None] = model.disable_adapter()
    return way


@contextlib.contextmanager
def _unprompted(model: Any) -> Iterator[None]:
    before = model.__dict__.get("forward")
    model.forward = model.get_base_model().forward
    try:
        yield
    finally:
        del model.forward
        if before is not None:
            model.forward = before


def _exchange(module: nn.Module, name: str) -> None:
    """A parameter and the buffer that keeps its first value have each other's values."""
    parameter, buffer = module.get_parameter(name), module.get_buffer(f"{FIRST}{name}")
    value = parameter.data
    parameter.data = buffer.data
    module._buffers[f"{FIRST}{name}"] = value
