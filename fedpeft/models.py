"""The frozen base and the adapter on it: load, install, extract, save."""

from __future__ import annotations

import contextlib
import copy
import json
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import peft
import torch
from safetensors import SafetensorError
from torch import nn

from fedpeft import own_layers, peft_layers, penalties
from fedpeft import residual_layers as residual
from fedpeft.adaptation import Binding, adapt, describe
from fedpeft.adapters import AdapterSpec, AdapterState, Family, at_ranks, low_rank_modules, ranks_of, resizable
from fedpeft.base_weights import placed
from fedpeft.bases import device_of, digest_of, load_base, load_tokenizer, model_path
from fedpeft.config.tasks import Head
from fedpeft.config.training import ModelConfig
from fedpeft.coordinates import Coordinates, put
from fedpeft.errors import AdapterError, ModelError, sentence
from fedpeft.files import encode_tensors, read_tensors, write_atomically
from fedpeft.randomness import derive_seed

HEAD_FILE = "head.safetensors"
"""The task's own last layer, in an exported folder without a peft adapter."""


@dataclass(frozen=True)
class AdaptedModel:
    """A frozen base with one trainable adapter on it; `initial` is the adapter as it was drawn.

    `coordinates` are those of the modules, by path, of which other numbers travel than are trained. `penalty` is
    what the family adds to the loss, if anything.
    """

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
    coordinates: Mapping[str, Coordinates] = field(default_factory=dict)
    penalty: Callable[[], torch.Tensor] | None = None


def load(config: ModelConfig, family: Family, head: Head, seed: int) -> AdaptedModel:
    """The base that `config` names, with the last layer of `head` and a fresh adapter drawn from `seed`.

    The base is never trained. Two processes with the same arguments hold the same numbers.

    Raises:
        ModelError: the base cannot be loaded, or the family cannot be put on it.
    """
    with _drawn_from(seed, "model"):
        tokenizer = load_tokenizer(config)
        base = load_base(config, head, int(tokenizer.pad_token_id))
        base_parameters, digest = _count(base), digest_of(config, base)
        device = torch.device(device_of(config))
        model = adapt(base if placed(config) else base.to(device), family, head, model_path(config))
        if not placed(config):
            model = model.to(device)
        _train_in_float32(model)
    precision = _precision(config, device)
    spec, bindings, coordinates = describe(model, family, head, digest)
    initial = AdapterState(spec, _read(spec, bindings, coordinates))
    return AdaptedModel(
        model,
        tokenizer,
        family,
        head,
        spec,
        bindings,
        initial,
        device,
        precision,
        base_parameters,
        coordinates,
        penalties.of(model, family),
    )


def _count(base: nn.Module) -> int:
    """The base's parameters, whatever format they are held in."""
    counts: Any = getattr(base, "num_parameters", None)
    return int(counts()) if counts else sum(parameter.numel() for parameter in base.parameters())


def _train_in_float32(model: nn.Module) -> None:
    """What is trained is in float32, whatever format the base is held in."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            parameter.data = parameter.data.float()


def _precision(config: ModelConfig, device: torch.device) -> torch.dtype:
    """The type that is computed in: where the base's weights are in bfloat16, which meet trained ones, no wider one."""
    asked: torch.dtype = getattr(torch, config.precision) if device.type == "cuda" else torch.float32
    return torch.bfloat16 if config.weights == "bfloat16" and asked == torch.float32 else asked


def most_tokens(adapted: AdaptedModel) -> int:
    """How many tokens of text the base has positions for, less those that the adapter puts before it."""
    settings: Any = adapted.model.config
    positions = getattr(settings, "max_position_embeddings", None) or sys.maxsize
    return int(positions) - int(adapted.family.peft.get("num_virtual_tokens", 0))


def extract(adapted: AdaptedModel) -> AdapterState:
    """The adapter's values now, at the ranks that it has now, as copies, with scales folded in."""
    tensors = _read(adapted.spec, adapted.bindings, adapted.coordinates)
    ranked = (f"{module.path}.A" for module in low_rank_modules(adapted.spec) if resizable(module))
    spec = at_ranks(adapted.spec, {key.removesuffix(".A"): tensors[key].shape[0] for key in ranked})
    return AdapterState(spec, tensors)


def trained(adapted: AdaptedModel, frozen: Collection[str] = ()) -> dict[str, nn.Parameter]:
    """The parameters that are trained for the tensors that are not in `frozen`.

    They are named by the tensor's key; where a tensor has several, a number comes behind it.
    """
    found: dict[str, nn.Parameter] = {}
    for key, binding in adapted.bindings.items():
        if key not in frozen:
            found |= {f"{key}/{at}" if at else key: parameter for at, parameter in enumerate(binding.parameters)}
    return found


def install(adapted: AdaptedModel, state: AdapterState) -> None:
    """The model computes with `state` from now on: at its ranks, and with its residual beside the base.

    Raises:
        AdapterError: `state` does not follow the model's specification, ranks aside.
    """
    if at_ranks(state.spec, ranks_of(adapted.spec)) != adapted.spec:
        raise AdapterError(
            sentence(
                "adapter",
                expected=f"specification {adapted.spec.digest[:12]}",
                found=state.spec.digest[:12],
                remedy="use the base model and adapter settings that it was made with",
            )
        )
    state.spec.require(state.tensors, "adapter")
    values = {k: torch.from_numpy(np.array(v, np.float32)).to(adapted.device) for k, v in state.tensors.items()}
    with torch.no_grad():
        for path, coordinates in adapted.coordinates.items():
            coordinates.write({name: values.pop(f"{path}.{name}") for name in coordinates.parameters})
        for key, value in values.items():
            binding = adapted.bindings[key]
            put(binding.parameter, value if binding.scale == 1.0 else value / binding.scale)
    residual.install(adapted.model, adapted.family, state.residual)


def save_adapter(adapted: AdaptedModel, state: AdapterState, folder: Path) -> None:
    """`folder` holds `state` in the layout that stock `peft.PeftModel.from_pretrained` loads, head included.

    `state` may have other ranks than the model was made with. Layers that peft does not have stand beside it in files
    of their own, and `load_adapter` reads all. A family with no adapter of its own is saved as a whole model.

    Raises:
        OSError: the disk is full or not writable.
    """
    install(adapted, state)
    model: Any = adapted.model
    with _saving(), residual.described(model, state.spec):
        if isinstance(model, peft.PeftModel):
            model.save_pretrained(str(folder), save_embedding_layers=False, selected_adapters=["default"])
            _sort_names(model.peft_config["default"], folder / "adapter_config.json")
        elif not adapted.family.own:
            model.save_pretrained(str(folder))
        if adapted.family.own:
            own_layers.save(model, folder, adapted.family.own)
            if not adapted.family.peft and (head := _head_tensors(state)):
                write_atomically(folder / HEAD_FILE, encode_tensors(head, {}))
        adapted.tokenizer.save_pretrained(str(folder))


def load_adapter(base: nn.Module, folder: Path) -> nn.Module:
    """`base` with the adapter that `save_adapter` wrote to `folder`, for inference; changed in place.

    Raises:
        AdapterError: the folder holds no adapter, or one that does not fit the base.
        ModelError: a method does not fit the base.
    """
    by_peft, own, head = folder / "adapter_config.json", folder / own_layers.SETTINGS, folder / HEAD_FILE
    if not by_peft.is_file() and not own.is_file():
        raise AdapterError(
            sentence(
                str(folder), expected="an adapter", found="none", remedy="name a folder that an export has written"
            )
        )
    base.requires_grad_(False)
    if own.is_file():
        own_layers.load(base, folder)
    if head.is_file():
        _load_head(base, head)
    with _reading(folder):
        return peft.PeftModel.from_pretrained(cast(Any, base), str(folder)) if by_peft.is_file() else base


def save_merged(adapted: AdaptedModel, state: AdapterState, folder: Path) -> None:
    """`folder` holds the base with `state` merged into its weights, as a stock transformers model.

    Raises:
        ModelError: the family adds tokens or layers that no weight of the base can take up.
        OSError: the disk is full or not writable.
    """
    install(adapted, state)
    model: Any = adapted.model
    if adapted.family.kind in ("prompt", "encoded", "llama_adapter"):
        raise ModelError(
            sentence(
                f"adapter family {adapted.family.name}",
                expected="one that can be merged into weights",
                found="one that adds to the input",
                remedy="export the adapter instead",
            )
        )
    merged = copy.deepcopy(model)
    if adapted.family.peft:
        merged = peft_layers.unload(merged)
    if adapted.family.own:
        own_layers.merge(merged)
    with _saving():
        merged.save_pretrained(str(folder))
        adapted.tokenizer.save_pretrained(str(folder))


def _sort_names(config: Any, path: Path) -> None:
    """The settings in `path` list in order what peft holds as sets, so that equal adapters are equal files."""
    tree = json.loads(path.read_text(encoding="utf-8"))
    tree |= {key: sorted(tree[key]) for key, value in vars(config).items() if isinstance(value, set) and tree.get(key)}
    path.write_text(json.dumps(tree, indent=2, sort_keys=True), encoding="utf-8")


def _head_tensors(state: AdapterState) -> dict[str, np.ndarray]:
    """The tensors of the task's own last layer, where no peft adapter holds them."""
    whole = (module for module in state.spec.modules if module.kind == "full")
    return {key: np.asarray(state.tensors[key]) for m in whole for name, _ in m.shapes for key in [f"{m.path}.{name}"]}


def _load_head(base: nn.Module, path: Path) -> None:
    with _reading(path):
        tensors, _ = read_tensors(path)
    own = dict(base.named_parameters())
    for name, value in tensors.items():
        if name not in own or tuple(own[name].shape) != value.shape:
            raise AdapterError(
                sentence(
                    f"{path}, tensor {name}",
                    expected="a tensor of the base, of its shape",
                    found=f"shape {value.shape}",
                    remedy="load the base with the task and the labels of the run",
                )
            )
    with torch.no_grad():
        for name, value in tensors.items():
            own[name].copy_(torch.from_numpy(value))


@contextlib.contextmanager
def _reading(place: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        remedy = "use the folder as it was written, and the base that it was made with"
        raise AdapterError(sentence(str(place), expected="an adapter", found=first, remedy=remedy)) from error


@contextlib.contextmanager
def _saving() -> Iterator[None]:
    """Inside, what safetensors raises for a disk that takes no more is an OSError, as it is everywhere else."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(str(error)) from error


def _read(
    spec: AdapterSpec, bindings: Mapping[str, Binding], coordinates: Mapping[str, Coordinates]
) -> dict[str, np.ndarray]:
    """The tensors of the adapter now, as copies, in the order of `spec`."""
    found: dict[str, np.ndarray] = {}
    with torch.no_grad():
        for path, moved in coordinates.items():
            found |= {f"{path}.{name}": _copied(value, 1.0) for name, value in moved.read().items()}
        for key, binding in bindings.items():
            if key not in found:
                found[key] = _copied(binding.parameter, binding.scale)
    return {key: found[key] for key in spec.shapes}


def _copied(value: torch.Tensor, scale: float) -> np.ndarray:
    value = value.detach().to(device="cpu", dtype=torch.float32)
    return np.array((value if scale == 1.0 else value * scale).numpy())


@contextlib.contextmanager
def _drawn_from(seed: int, purpose: str) -> Iterator[None]:
    """Torch's global generator stands at a seed of its own inside, and where it stood before after."""
    with torch.random.fork_rng():
        torch.manual_seed(derive_seed(seed, purpose))
        yield
