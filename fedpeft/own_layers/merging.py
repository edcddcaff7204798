"""Methods folded into the base's weights, so that nothing is left beside them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from fedpeft.errors import ModelError, sentence
from fedpeft.own_layers.install import release
from fedpeft.own_layers.layers import OwnLayer, base_of, canonical, claims, own_layers, put
from fedpeft.own_layers.masks import take_masks
from fedpeft.own_layers.methods import OWN

_BIASES: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "llama": {
        "attention_bias": ("q_proj", "k_proj", "v_proj", "o_proj"),
        "mlp_bias": ("gate_proj", "up_proj", "down_proj"),
    },
}
"""Settings of an architecture that say whether its linear layers have biases, and the layers that each is about."""


def merge(model: nn.Module) -> None:
    """`model` computes what it did, to rounding, with no layer of ours in it and nothing that a method trains.

    A scale and a shift go into the weight and the bias before them: diag(scale) W and scale ⊙ b + shift. A linear
    layer without a bias gets one where the base's settings can say so, and all layers that the setting is about get
    one with it. On an error the model is left as it was.

    Raises:
        ModelError: a method is not one that weights can take up, or a shift has no bias to go to.
    """
    model = base_of(model)
    layers = own_layers(model)
    for path, layer in layers.items():
        _require_mergeable(model, path, layer)
    for setting in {_setting(model, path) for path, layer in layers.items() if _lacks_bias(layer)}:
        _add_biases(model, setting)
    take_masks(model, keep=True)
    for path, layer in reversed(layers.items()):
        with torch.no_grad():
            _fold(layer.base_layer, layer.own)
        put(model, path, layer.base_layer)
    for module, name in claims(model):
        release(module, name)


def _require_mergeable(model: nn.Module, path: str, layer: OwnLayer) -> None:
    place, module = f"adapter.{layer.method} on {canonical(path)}", _of(layer)
    if not OWN[layer.method].merges:
        raise ModelError(
            sentence(
                place,
                expected="a method that can be merged into weights",
                found="a bottleneck, which is not linear",
                remedy="export the adapter instead",
            )
        )
    if not module.weight.is_floating_point():
        raise ModelError(
            sentence(
                place,
                expected="weights that are not quantised",
                found=str(module.weight.dtype).removeprefix("torch."),
                remedy="export the adapter instead",
            )
        )
    if _lacks_bias(layer) and not _setting(model, path):
        raise ModelError(
            sentence(
                place,
                expected="a bias that the shift can be merged into",
                found="none, in an architecture that has none there",
                remedy="export the adapter instead",
            )
        )


def _of(layer: OwnLayer) -> Any:
    return layer.base_layer


def _lacks_bias(layer: OwnLayer) -> bool:
    return _of(layer).bias is None and bool(torch.count_nonzero(layer.own.get_parameter("shift")))


def _setting(model: Any, path: str) -> str:
    """The setting of the base that says whether the layer at `path` has a bias; empty where there is none."""
    settings = _BIASES.get(getattr(getattr(model, "config", None), "model_type", ""), {})
    return next((setting for setting, names in settings.items() if path.rpartition(".")[2] in names), "")


def _add_biases(model: Any, setting: str) -> None:
    """Every layer that `setting` is about has a bias, of zeros where it had none, and the base's settings say so."""
    setattr(model.config, setting, True)
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and module.bias is None and _setting(model, canonical(path)) == setting:
            dtype = module.weight.dtype if module.weight.is_floating_point() else torch.float32
            zeros = torch.zeros(module.out_features, dtype=dtype, device=module.weight.device)
            module.bias = nn.Parameter(zeros, requires_grad=False)


def _fold(module: Any, own: nn.Module) -> None:
    scale, shift = own.get_parameter("scale"), own.get_parameter("shift")
    transposed = hasattr(module, "nf") and hasattr(module, "nx")
    shape = (1, -1) if transposed else (-1, *[1] * (module.weight.dim() - 1))
    module.weight.mul_(scale.view(shape))
    if module.bias is not None:
        module.bias.mul_(scale).add_(shift)
