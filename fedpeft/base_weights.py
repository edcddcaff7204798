"""How the frozen base is held in memory: its number format, where it lies, what is kept for the backward pass."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from torch import nn

from fedpeft.config.training import ModelConfig
from fedpeft.errors import ModelError, sentence

HEADS = ("pre_classifier", "classifier", "score")
"""Names that transformers gives the layers that a task has of its own; they are never quantised."""

QUANTISED = ("nf4", "int8")
"""The formats that bitsandbytes holds."""

_SAMPLED_ROWS = 16
"""So many rows of each tensor of a checkpoint stand for it, evenly spaced."""


def loading_arguments(config: ModelConfig, device: str, whole: Collection[str]) -> dict[str, Any]:
    """What transformers is told of the weights' format and place; the modules `whole` are never quantised.

    Raises:
        ModelError: the library that holds the format is not installed.
    """
    if config.weights not in QUANTISED:
        placed = {"device_map": config.device_map} if config.device_map else {}
        return {"dtype": getattr(torch, config.weights), **placed}
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(
            sentence(
                "model.weights",
                expected=f"the library bitsandbytes for {config.weights}",
                found="it is not installed",
                remedy="install fedpeft[quantised], or set model.weights=bfloat16",
            )
        )
    quantised = transformers.BitsAndBytesConfig(**_BITS[config.weights], llm_int8_skip_modules=[*whole, "lm_head"])  # type: ignore[no-untyped-call]
    return {"dtype": torch.float32, "quantization_config": quantised, "device_map": config.device_map or {"": device}}


_BITS: Mapping[str, Mapping[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32},
    "int8": {"load_in_8bit": True},
}


def placed(config: ModelConfig) -> bool:
    """Whether transformers puts the base where it belongs, so that it must not be moved."""
    return config.weights in QUANTISED or bool(config.device_map)


def keep_less(base: Any, config: ModelConfig) -> None:
    """The base computes layers again in the backward pass instead of keeping what they gave, if that is asked for.

    Raises:
        ModelError: it cannot.
    """
    if not config.gradient_checkpointing:
        return
    if not getattr(base, "supports_gradient_checkpointing", False):
        raise ModelError(
            sentence(
                "model.gradient_checkpointing",
                expected="a model that can compute its layers again",
                found=type(base).__name__,
                remedy="set it to false",
            )
        )
    base.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    base.config.use_cache = False


def held_bytes(model: nn.Module) -> int:
    """Bytes that the frozen weights take as they are held."""
    return sum(p.numel() * p.element_size() for p in model.parameters() if not p.requires_grad)


def checkpoint_digest(files: Sequence[Path], names: Collection[str]) -> str:
    """SHA-256 over a sample of each tensor of a checkpoint, and over the names of the parameters that it fills.

    It tells one base from another, whatever format a node holds it in; it does not prove that two are equal.
    """
    sha = hashlib.sha256("\n".join(sorted(names)).encode())
    for key, rows in sorted(_tensors(files).items()):
        sha.update(key.encode() + rows())
    return sha.hexdigest()


def _tensors(files: Sequence[Path]) -> dict[str, Callable[[], bytes]]:
    """A function for each tensor of the files, by name, that gives its shape and some rows as bytes."""
    found: dict[str, Callable[[], bytes]] = {}
    for path in files:
        with safe_open(str(path), framework="pt") as opened:
            found |= {key: _sampler(path, key) for key in opened.keys()}  # noqa: SIM118
    return found


def _sampler(path: Path, key: str) -> Callable[[], bytes]:
    def rows() -> bytes:
        with safe_open(str(path), framework="pt") as opened:
            part = opened.get_slice(key)
            shape = part.get_shape()
            if not shape:
                return bytes(opened.get_tensor(key).float().numpy().tobytes())
            step = max(1, shape[0] // _SAMPLED_ROWS)
            sampled = torch.cat([part[at : at + 1] for at in range(0, shape[0], step)])
            return str(shape).encode() + bytes(sampled.float().numpy().tobytes())

    return rows
