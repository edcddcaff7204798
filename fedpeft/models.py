"""The frozen base and the adapter on it: load, install, extract, save."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
from safetensors import SafetensorError
from torch import nn

from fedpeft import residual_layers as residual
from fedpeft import sb_layers
from fedpeft.adapters import AdapterSpec, AdapterState, Family, ModuleSpec, at_ranks, low_rank_modules
from fedpeft.bases import device_of, load_base, load_tokenizer, model_path
from fedpeft.config.tasks import Head
from fedpeft.config.training import ModelConfig
from fedpeft.errors import AdapterError, ModelError, sentence
from fedpeft.randomness import derive_seed

_HEADS = ("classifier", "score")
"""Names that transformers gives the task's own last layer, as peft knows them."""

_REBUILT: Mapping[str, Callable[[nn.Module, Family], None]] = {"lora_sb": sb_layers.rebuild}
"""What is done to peft's layers of a kind that peft does not have."""


@dataclass(frozen=True)
class Binding:
    """Where a tensor of the adapter lives in the model, and the scale that its stored value carries."""

    parameter: nn.Parameter
    scale: float


@dataclass(frozen=True)
class AdaptedModel:
    """A frozen base with one trainable adapter on it; `initial` is the adapter as it was drawn."""

    model: nn.Module
    tokenizer: Any
    family: Family
    head: Head
    spec: AdapterSpec
    bindings: Mapping[str, Binding]
    initial: AdapterState
    device: torch.device
    precision: torch.dtype
    base_parameters: int


def load(config: ModelConfig, family: Family, head: Head, seed: int) -> AdaptedModel:
    """The base that `config` names, with the last layer of `head` and a fresh adapter drawn from `seed`.

    The base is in float32 and never trained. Two processes with the same arguments hold the same numbers.

    Raises:
        ModelError: the base cannot be loaded, or the family cannot be put on it.
    """
    with _drawn_from(seed, "model"):
        tokenizer = load_tokenizer(config)
        base = load_base(config, head, int(tokenizer.pad_token_id))
        base_parameters = sum(parameter.numel() for parameter in base.parameters())
        device = torch.device(device_of(config))
        model = _install(base.to(device), family, head, model_path(config)).to(device)
    precision = getattr(torch, config.precision) if device.type == "cuda" else torch.float32
    spec, bindings = _describe(model, family)
    initial = AdapterState(spec, {key: _folded(binding) for key, binding in bindings.items()})
    return AdaptedModel(model, tokenizer, family, head, spec, bindings, initial, device, precision, base_parameters)


def most_tokens(adapted: AdaptedModel) -> int:
    """How many tokens of text the base has positions for, less those that the adapter puts before it."""
    settings: Any = adapted.model.config
    positions = getattr(settings, "max_position_embeddings", None) or sys.maxsize
    return int(positions) - int(adapted.family.peft.get("num_virtual_tokens", 0))


def extract(adapted: AdaptedModel) -> AdapterState:
    """The adapter's values now, at the ranks that it has now, as copies, with scales folded in."""
    tensors = {key: _folded(binding) for key, binding in adapted.bindings.items()}
    ranked = (f"{module.path}.A" for module in low_rank_modules(adapted.spec))
    spec = at_ranks(adapted.spec, {key.removesuffix(".A"): tensors[key].shape[0] for key in ranked})
    return AdapterState(spec, tensors)


def install(adapted: AdaptedModel, state: AdapterState) -> None:
    """The model computes with `state` from now on: at its ranks, and with its residual beside the base.

    Raises:
        AdapterError: `state` does not follow the model's specification, ranks aside.
    """
    own = {module.path: module.rank for module in adapted.spec.modules}
    if at_ranks(state.spec, own) != adapted.spec:
        raise AdapterError(
            sentence(
                "adapter",
                expected=f"specification {adapted.spec.digest[:12]}",
                found=state.spec.digest[:12],
                remedy="use the base model and adapter settings that it was made with",
            )
        )
    state.spec.require(state.tensors, "adapter")
    with torch.no_grad():
        for key, binding in adapted.bindings.items():
            value = torch.from_numpy(np.array(state.tensors[key], np.float32)).to(adapted.device)
            _put(binding.parameter, value if binding.scale == 1.0 else value / binding.scale)
    residual.install(adapted.model, adapted.family, state.residual)


def save_adapter(adapted: AdaptedModel, state: AdapterState, folder: Path) -> None:
    """`folder` holds `state` in the layout that stock `peft.PeftModel.from_pretrained` loads, head included.

    `state` may have other ranks than the model was made with. A family with no adapter of its own is saved as a
    whole model.

    Raises:
        OSError: the disk is full or not writable.
    """
    install(adapted, state)
    model: Any = adapted.model
    with _saving(), residual.described(model, state.spec):
        if isinstance(model, peft.PeftModel):
            model.save_pretrained(str(folder), save_embedding_layers=False, selected_adapters=["default"])
        else:
            model.save_pretrained(str(folder))
        adapted.tokenizer.save_pretrained(str(folder))


def save_merged(adapted: AdaptedModel, state: AdapterState, folder: Path) -> None:
    """`folder` holds the base with `state` merged into its weights, as a stock transformers model.

    Raises:
        ModelError: the family adds tokens or layers that no weight of the base can take up.
        OSError: the disk is full or not writable.
    """
    install(adapted, state)
    model: Any = adapted.model
    if adapted.family.kind == "prompt":
        raise ModelError(
            sentence(
                f"adapter family {adapted.family.name}",
                expected="one that can be merged into weights",
                found="one that adds to the input",
                remedy="export the adapter instead",
            )
        )
    merged = copy.deepcopy(model).merge_and_unload() if adapted.family.peft else model
    with _saving():
        merged.save_pretrained(str(folder))
        adapted.tokenizer.save_pretrained(str(folder))


@contextlib.contextmanager
def _saving() -> Iterator[None]:
    """Inside, what safetensors raises for a disk that takes no more is an OSError, as it is everywhere else."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(str(error)) from error


def _install(base: nn.Module, family: Family, head: Head, source: str) -> nn.Module:
    for parameter in base.parameters():
        parameter.requires_grad_(False)
    if not family.peft:
        for name, parameter in base.named_parameters():
            parameter.requires_grad_(name.split(".")[0] in _HEADS)
        return base
    arguments = {**family.peft, "task_type": head.task_type or None, "base_model_name_or_path": source}
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
            warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False", category=UserWarning)
            model: nn.Module = peft.get_peft_model(base, peft.get_peft_config(arguments))
    except (ValueError, TypeError, AttributeError) as error:
        raise ModelError(
            sentence(
                f"adapter.{family.name}",
                expected=f"settings that fit {type(base).__name__}",
                found=str(error).splitlines()[0],
                remedy="name target_modules that this model has",
            )
        ) from error
    if rebuild := _REBUILT.get(family.kind):
        rebuild(model, family)
    return model


def _describe(model: nn.Module, family: Family) -> tuple[AdapterSpec, dict[str, Binding]]:
    """The specification of the model's trainable tensors, and where each of them is."""
    scales = _scales(model, family)
    found: dict[tuple[str, str], dict[str, Binding]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            path, kind, tensor = family.locate(name)
            scale = scales.get(path, 1.0) if kind == family.kind and tensor == family.folded else 1.0
            found.setdefault((path, kind), {})[tensor] = Binding(parameter, scale)
    modules = tuple(
        _module_spec(path, kind, tensors, family, scales.get(path, 1.0))
        for (path, kind), tensors in sorted(found.items())
    )
    spec = AdapterSpec(_base_digest(model), family.name, modules)
    flat = {f"{path}.{name}": binding for (path, _), tensors in found.items() for name, binding in tensors.items()}
    return spec, {key: flat[key] for key in spec.shapes}


def _module_spec(path: str, kind: str, tensors: Mapping[str, Binding], family: Family, scale: float) -> ModuleSpec:
    shapes = tuple((name, tuple(tensors[name].parameter.shape)) for name in sorted(tensors))
    own = kind == family.kind and family.ranked in tensors
    rank = tensors[family.ranked].parameter.shape[0] if own else 0
    return ModuleSpec(path, kind, rank, scale if own else 1.0, shapes)


def _scales(model: nn.Module, family: Family) -> dict[str, float]:
    """What each adapted module multiplies its factors' product by, by module path."""
    if not family.folded:
        return {}
    return {
        name.removeprefix(family.prefix): float(module.scaling["default"])
        for name, module in model.named_modules()
        if isinstance(getattr(module, "scaling", None), dict) and "default" in module.scaling
    }


def _base_digest(model: nn.Module) -> str:
    """SHA-256 over names, shapes and a sample of at most 256 values of each frozen tensor.

    It tells one base from another; it does not prove that two are equal. The original head, which a trained
    copy replaces, is left out.
    """
    sha = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if not parameter.requires_grad and "original_module" not in name:
            flat = parameter.detach().reshape(-1)
            sample = flat[:: max(1, flat.numel() // 256)].float().cpu().numpy()
            sha.update(f"{name}{tuple(parameter.shape)}".encode() + sample.tobytes())
    return sha.hexdigest()


def _put(parameter: nn.Parameter, value: torch.Tensor) -> None:
    """The parameter holds `value`, which may be of another rank than what it held."""
    if parameter.shape == value.shape:
        parameter.copy_(value)
    else:
        parameter.grad = None
        parameter.data = value.to(parameter.dtype)


def _folded(binding: Binding) -> np.ndarray:
    value = binding.parameter.detach().to(device="cpu", dtype=torch.float32)
    return np.array((value if binding.scale == 1.0 else value * binding.scale).numpy())


@contextlib.contextmanager
def _drawn_from(seed: int, purpose: str) -> Iterator[None]:
    """Torch's global generator stands at a seed of its own inside, and where it stood before after."""
    with torch.random.fork_rng():
        torch.manual_seed(derive_seed(seed, purpose))
        yield
