"""A family's layers on a frozen base, and where each tensor of the adapter is among them."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import peft
import torch
from torch import nn

from fedpeft import own_layers, peft_layers, sb_layers
from fedpeft.adapters import AdapterSpec, Family, ModuleSpec, rank_of
from fedpeft.base_weights import HEADS
from fedpeft.config.tasks import Head
from fedpeft.coordinates import COORDINATES, Coordinates, encode_prompts
from fedpeft.errors import ModelError, sentence

_HEADS_OF_PEFT = ("classifier", "score")
"""Names that transformers gives the task's own last layer, as peft knows them."""

_WARNINGS = (
    "fan_in_fan_out is set to False",
    "Specified to not save",
    "Sparse invariant checks",
    "Failed to load the CUDA extension",
    "Setting boft_n_butterfly",
    "Unsupported layer type",
    "Note that `r` is not used in AdaLora",
)
"""How warnings of peft begin that tell of what is meant here."""

_REFUSALS = (ValueError, TypeError, AttributeError, LookupError, NotImplementedError)
"""What peft raises for a model or settings that do not fit."""

_REBUILT: Mapping[str, Callable[[nn.Module, Family], None]] = {
    "lora_sb": sb_layers.rebuild,
    "encoded": lambda model, family: encode_prompts(model),  # noqa: ARG005
    # FRoD makes sparse tensors; torch warns until it is told whether they are to be checked, which is slow.
    "frod": lambda model, family: torch.sparse.check_sparse_tensor_invariants.disable(),  # type: ignore[no-untyped-call]  # noqa: ARG005
}
"""What is done to peft's layers, or said to torch, for a kind of module once they are there."""


@dataclass(frozen=True)
class Binding:
    """What is trained for a tensor of the adapter, and the scale that its stored value carries.

    A tensor in coordinates of its own may have several parameters, or none beside those of another tensor.
    """

    parameters: tuple[nn.Parameter, ...]
    scale: float = 1.0

    @property
    def parameter(self) -> nn.Parameter:
        """The only parameter, of the tensor's own shape."""
        (parameter,) = self.parameters
        return parameter


def adapt(base: nn.Module, family: Family, head: Head, source: str) -> nn.Module:
    """The model that computes with a fresh adapter of `family` on `base`; only that and the task's head are trained.

    What must be drawn is drawn from torch's global generator. `source` is what an exported adapter calls its base.

    Raises:
        ModelError: the family cannot be put on this base.
    """
    for parameter in base.parameters():
        parameter.requires_grad_(False)
    for method, settings in family.own:
        own_layers.install(base, method, settings)
    model = _under_peft(base, family, head, source) if family.peft else base
    if family.peft:
        own_layers.retrain(model)
    else:
        for name in _heads(base, head):
            base.get_submodule(name).requires_grad_(True)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ModelError(
            sentence(
                f"adapter.{family.name}",
                expected="something to train",
                found=f"nothing in {type(base).__name__}, which has no last layer of the task's own",
                remedy="choose lora, or another family with tensors of its own",
            )
        )
    if rebuild := _REBUILT.get(family.kind):
        rebuild(model, family)
    return model


def _under_peft(base: nn.Module, family: Family, head: Head, source: str) -> nn.Module:
    """The base inside the peft model that the family asks for; the task's own last layer is trained whole."""
    arguments = {**family.peft, "task_type": head.task_type or None, "base_model_name_or_path": source}
    heads = _heads(base, head)
    if unknown := [name for name in heads if not head.task_type or name not in _HEADS_OF_PEFT]:
        arguments["modules_to_save"] = unknown
    if unknown or (heads and not peft_layers.makes_heads(arguments)):
        peft_layers.require_heads(arguments, family)
    if arguments.get("target_modules") == "all-linear" and heads:
        arguments["exclude_modules"] = heads
    peft_layers.require_arguments(arguments, family)
    try:
        return _peft_model(base, arguments)
    except _REFUSALS as error:
        ours = peft_layers.usual_targets(base, arguments)
        if not ours:
            raise peft_layers.refusal(base, family, arguments, error) from error
        arguments |= ours
    try:
        return _peft_model(base, arguments)
    except _REFUSALS as error:
        raise peft_layers.refusal(base, family, arguments, error) from error


def _peft_model(base: nn.Module, arguments: Mapping[str, Any]) -> nn.Module:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        for message in _WARNINGS:
            warnings.filterwarnings("ignore", message=message, category=UserWarning)
        return peft.get_peft_model(base, peft.get_peft_config(dict(arguments)))


def _heads(base: nn.Module, head: Head) -> list[str]:
    """The names of the task's own last layer, where it has one."""
    return [name for name, _ in base.named_children() if name in HEADS] if head.labels else []


def describe(
    model: nn.Module, family: Family, head: Head, digest: str = ""
) -> tuple[AdapterSpec, dict[str, Binding], dict[str, Coordinates]]:
    """The specification of the model's trainable tensors, where each of them is, and in which coordinates.

    `digest` tells the base from others (empty: it is taken from the weights as they are held).
    """
    scales, own = _scales(model, family), set(own_layers.trainable(model))
    found: dict[tuple[str, str], dict[str, nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            path, kind, tensor = family.locate(name)
            peft_layers.require_known(name, kind, tensor in found.get((path, kind), {}), family)
            if kind == "full" and name in own and path.split(".")[0] not in _heads_of(model, head):
                path, kind = path.replace(".base_layer", ""), "selective"
            found.setdefault((path, kind), {})[_distinct(tensor, found.get((path, kind)))] = parameter
    modules: list[ModuleSpec] = []
    bindings: dict[str, Binding] = {}
    coordinates: dict[str, Coordinates] = {}
    for (path, kind), parameters in sorted(found.items()):
        if kind in COORDINATES:
            moved = COORDINATES[kind](_module_at(model, family, path), parameters, path)
            coordinates[path] = moved
            shapes = {name: tuple(value.shape) for name, value in moved.read().items()}
            bound = {name: Binding(parameters) for name, parameters in moved.parameters.items()}
        else:
            shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
            scale = scales.get(path, 1.0) if kind == family.kind else 1.0
            bound = {
                name: Binding((parameter,), scale if name == family.folded else 1.0)
                for name, parameter in parameters.items()
            }
        bindings |= {f"{path}.{name}": binding for name, binding in bound.items()}
        modules.append(_module_spec(path, kind, shapes, family, scales.get(path, 1.0)))
    spec = AdapterSpec(digest or _base_digest(model), family.name, tuple(modules))
    return spec, {key: bindings[key] for key in spec.shapes}, coordinates


def _distinct(tensor: str, taken: Mapping[str, nn.Parameter] | None) -> str:
    """The tensor's name, with a number behind it where the module has one of that name (an encoder's layers)."""
    count = sum(name.split("/")[0] == tensor for name in taken or ())
    return f"{tensor}/{count}" if count else tensor


def _heads_of(model: nn.Module, head: Head) -> list[str]:
    base = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    return _heads(base, head)


def _module_at(model: Any, family: Family, path: str) -> Any:
    """The peft layer at a path of the base, or the prompt encoder."""
    encoders = getattr(model, "prompt_encoder", None)
    return encoders["default"] if encoders and path == family.name else model.get_submodule(f"{family.prefix}{path}")


def _module_spec(
    path: str, kind: str, shapes: Mapping[str, tuple[int, ...]], family: Family, scale: float
) -> ModuleSpec:
    module = ModuleSpec(path, kind, 0, 1.0, tuple(sorted(shapes.items())))
    own = kind == family.kind and bool(family.ranked or family.folded)
    return replace(module, rank=rank_of(module), scale=scale if own else 1.0)


def _scales(model: nn.Module, family: Family) -> dict[str, float]:
    """What each adapted module multiplies its factors' product by, by module path."""
    if not family.folded and not family.ranked:
        return {}
    return {
        name.removeprefix(family.prefix): peft_layers.scale_of(module)
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
