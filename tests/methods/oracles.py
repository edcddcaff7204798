"""What an adapter does, by other code than the server's: merged weights, layers run alone, vectors that peft reads.

All in float64. What a weight is changed by is what peft's own merge leaves in the base (or ours, for layers that peft
lacks) less what was there. A layer that no weight can take up is run alone on fixed features. A prompt is what peft
saves of it.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from fedpeft import models, own_layers
from fedpeft.adapters import AdapterState, ModuleSpec, Tensors
from fedpeft.models import AdaptedModel
from fedpeft.own_layers.layers import OwnLayer
from tests.methods.cells import Subject, bare, logits

Effect = dict[str, np.ndarray]
"""Float64 by the name of a weight, of a layer or of a prompt."""

BESIDE = ("bottleneck", "ssf")
"""Kinds of layers that are run alone."""

PROMPTS = ("prompt", "encoded")

WHOLE = ("full", "selective", "layer_norm")
"""Kinds whose tensors are called like those of the base."""


def effect(subject: Subject, state: AdapterState) -> Effect:
    """What `state` does on the first model: the change of each weight, what each layer makes, the prompt's vectors."""
    adapted, found = subject.one, {}
    models.install(adapted, state)
    if subject.kinds & set(BESIDE):
        found |= _beside(adapted.model)
    if "visual_prompt" in dict(adapted.family.own):
        found |= {name: numbers(p) for name, p in adapted.model.named_parameters() if name.endswith(".vectors")}
    elif subject.kinds & set(PROMPTS):
        found[adapted.family.name] = numbers(adapted.model.get_prompt_embedding_to_save("default"))
    if "llama_adapter" in subject.kinds:
        found[adapted.family.name] = _attention(subject)
    if not found:
        before = weights(bare(subject.cell.kind))
        after = weights(merged(adapted))
        found = {name: after[name] - before.get(name, 0.0) for name in after}
    return found


def kind_of(subject: Subject, name: str) -> str:
    """The kind of the module whose effect is called `name`."""
    spec, (path, _, tensor) = subject.one.spec, name.rpartition(".")
    for module in spec.modules:
        mine = tensor in dict(module.shapes) if module.kind in WHOLE else tensor == "weight"
        if (module.path == path and mine) or module.path == name:
            return module.kind
    return subject.one.family.kind


def merged(adapted: AdaptedModel) -> nn.Module:
    """A base in float64 that does what the model does."""
    model: Any = copy.deepcopy(adapted.model).double()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if adapted.family.peft:
            model = model.merge_and_unload()
    if adapted.family.own:
        own_layers.merge(model)
    whole: nn.Module = model
    return whole


def weights(model: nn.Module) -> Effect:
    return {name: numbers(parameter) for name, parameter in model.named_parameters()}


def numbers(value: torch.Tensor) -> np.ndarray:
    found: np.ndarray = value.detach().double().numpy()
    return found


def _beside(model: nn.Module) -> Effect:
    found = {}
    for name, layer in model.named_modules():
        if isinstance(layer, OwnLayer):
            own = copy.deepcopy(layer.own).double()
            width = next(own.parameters()).shape[-1]
            x = torch.randn(5, width, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
            with torch.no_grad():
                trailing = getattr(own, "trailing", 0)
                found[name] = numbers(own(x[(..., *[None] * trailing)]))
    return {own_layers.canonical(name.removeprefix("base_model.")): value for name, value in found.items()}


def _attention(subject: Subject) -> np.ndarray:
    """What the last layer's attention makes; no layer before it is adapted, so it reads the same always."""
    layer = subject.one.model.get_base_model().model.layers[-1].self_attn
    seen: list[np.ndarray] = []
    hook = layer.register_forward_hook(lambda _module, _inputs, output: seen.append(numbers(output[0])))
    logits(subject.one.model, subject.cell.kind)
    hook.remove()
    return seen[0]


Lift = Callable[[np.ndarray, Any, Mapping[str, np.ndarray]], np.ndarray]
"""From a product in factored form, multiplied out, to the change of a weight; linear in the product (and in g)."""


def _itself(product: np.ndarray, layer: Any, own: Mapping[str, np.ndarray]) -> np.ndarray:
    return product


def _times_weight(product: np.ndarray, layer: Any, own: Mapping[str, np.ndarray]) -> np.ndarray:
    return numbers(layer.get_base_layer().weight) * product


def _beside_rows(product: np.ndarray, layer: Any, own: Mapping[str, np.ndarray]) -> np.ndarray:
    return (own["g"] - 1.0)[:, None] * numbers(layer.get_base_layer().weight) + product


def _between(product: np.ndarray, layer: Any, own: Mapping[str, np.ndarray]) -> np.ndarray:
    outputs, inputs = layer.get_base_layer().weight.shape
    b, a = numbers(layer.vera_B["default"])[:outputs], numbers(layer.vera_A["default"])[:, :inputs]
    if product.shape != (outputs, len(a)):
        product = product.reshape(outputs, len(a))
    return (b * product) @ a


def _rearranged(product: np.ndarray, layer: Any, own: Mapping[str, np.ndarray]) -> np.ndarray:
    """Σ vec(W1) vec(W2)ᵀ, number by number, to Σ W1 ⊗ W2."""
    outer, shape = own["w1"].shape, layer.get_base_layer().weight.shape
    inner = (shape[0] // outer[0], shape[1] // outer[1])
    return product.reshape(*outer, *inner).transpose(0, 2, 1, 3).reshape(shape)


LIFTS: Mapping[str, Lift] = {
    "lora": _itself,
    "lora_fa": _itself,
    "lora_sb": _itself,
    "adalora": _itself,
    "loha": _itself,
    "dora": _beside_rows,
    "hira": _times_weight,
    "lokr": _rearranged,
    "vera": _between,
}
"""How the product of each kind becomes a change of the weight, by the formulas of the papers."""


def lifted(subject: Subject, module: ModuleSpec, product: np.ndarray, tensors: Tensors) -> np.ndarray:
    """The change of the weight at a module whose product is `product`; other tensors are those of `tensors`."""
    layer = subject.one.model.get_submodule(f"{subject.one.family.prefix}{module.path}")
    own = {name: np.asarray(tensors[f"{module.path}.{name}"], np.float64) for name, _ in module.shapes}
    return LIFTS[module.kind](product, layer, own)
