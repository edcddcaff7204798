"""A residual beside a frozen base, as a second LoRA adapter that is never trained; and what peft is told of ranks."""

from __future__ import annotations

import contextlib
import copy
import math
import re
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from fedpeft.adapters import AdapterSpec, Family, Tensors, resizable

NAME = "fedpeft_residual"
"""The residual's name among peft's adapters; no module of a base is called so."""


def install(model: nn.Module, family: Family, residual: Tensors) -> None:
    """The base computes with `residual` beside its weights from now on; with an empty one, alone.

    It rides beside the weights and is not merged into them, so a quantised base stays as it is.
    """
    layers = _layers(model, family)
    if residual and not any(NAME in layer.r for layer in layers.values()):
        _add(model)
    for path, layer in layers.items():
        has = f"{path}.A" in residual
        layer._active_adapter = ["default", NAME] if has else "default"
        if has:
            for name, parameter in _tensors(layer).items():
                value = torch.from_numpy(np.array(residual[f"{path}.{name}"], np.float32))
                parameter.data = value.to(parameter.device, parameter.dtype)


@contextlib.contextmanager
def described(model: nn.Module, spec: AdapterSpec) -> Iterator[None]:
    """Inside, peft's settings of the adapter say the ranks of `spec` and what scales go with them."""
    config: Any = getattr(model, "peft_config", {}).get("default")
    modules = [module for module in spec.modules if resizable(module)]
    if config is None or not modules or all(module.rank == config.r for module in modules):
        yield
        return
    told = ("r", "lora_alpha", "rank_pattern", "alpha_pattern")
    before = {key: getattr(config, key) for key in told if hasattr(config, key)}
    root = math.sqrt if getattr(config, "use_rslora", False) else float
    alphas = {module.path: module.scale * root(module.rank) for module in modules}
    rank = max(module.rank for module in modules)
    alpha = next(alphas[module.path] for module in modules if module.rank == rank)
    unlike = [module for module in modules if (module.rank, alphas[module.path]) != (rank, alpha)]
    ranks = {re.escape(module.path): module.rank for module in unlike}
    own = {re.escape(module.path): alphas[module.path] for module in unlike}
    for key, value in zip(told, (rank, alpha, ranks, own), strict=True):
        if key in before:  # HiRA has no alpha
            setattr(config, key, value)
    try:
        yield
    finally:
        for key, value in before.items():
            setattr(config, key, value)


_LAYERS: weakref.WeakKeyDictionary[nn.Module, dict[str, LoraLayer]] = weakref.WeakKeyDictionary()
"""Those of the models of this process: each is looked for once, as an adapter is installed for every client."""


def _layers(model: nn.Module, family: Family) -> dict[str, LoraLayer]:
    if model not in _LAYERS:
        named = model.named_modules()
        found = {name.removeprefix(family.prefix): layer for name, layer in named if isinstance(layer, LoraLayer)}
        _LAYERS[model] = found
    return _LAYERS[model]


def _add(model: Any) -> None:
    """A second adapter on the modules of the first, at rank 1 until it is filled, frozen."""
    config = copy.deepcopy(model.peft_config["default"])
    plain = {"r": 1, "lora_alpha": 1, "use_rslora": False, "lora_dropout": 0.0, "rank_pattern": {}, "alpha_pattern": {}}
    for key, value in {**plain, "modules_to_save": None, "task_type": None, "inference_mode": True}.items():
        setattr(config, key, value)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    with torch.random.fork_rng():
        model.add_adapter(NAME, config)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)


def _tensors(layer: Any) -> dict[str, nn.Parameter]:
    if NAME in layer.lora_embedding_A:
        return {"A": layer.lora_embedding_A[NAME], "B": layer.lora_embedding_B[NAME]}
    return {"A": layer.lora_A[NAME].weight, "B": layer.lora_B[NAME].weight}
