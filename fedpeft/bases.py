"""The frozen base and its tokenizer, as transformers loads them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import nn

from fedpeft.assets import resolve
from fedpeft.config.tasks import Head
from fedpeft.config.training import ModelConfig
from fedpeft.errors import ModelError, sentence


def model_path(config: ModelConfig) -> str:
    """The folder or Hub name that `config.source` stands for."""
    if config.source.startswith("asset:"):
        return str(resolve(config.source.removeprefix("asset:")))
    return config.source


def load_base(config: ModelConfig, head: Head, pad: int) -> nn.Module:
    """The base that `config` names, in float32 on the CPU, with the head that a task needs.

    Raises:
        ModelError: it cannot be loaded for this task.
    """
    source, names = model_path(config), dict(enumerate(head.labels))
    with _loading(config):
        settings = transformers.AutoConfig.from_pretrained(source, **_from_where(config))
        for key, value in settings.to_dict().items():
            if "drop" in key and isinstance(value, float):
                setattr(settings, key, config.dropout)
        settings.pad_token_id = pad
        if names:
            settings.num_labels, settings.id2label = len(names), names
            settings.label2id = {name: number for number, name in names.items()}
        base: nn.Module = getattr(transformers, head.auto).from_pretrained(
            source, config=settings, dtype=torch.float32, **_from_where(config)
        )
    return base


def load_tokenizer(config: ModelConfig) -> Any:
    """The tokenizer of the base that `config` names, able to pad.

    Raises:
        ModelError: there is none.
    """
    with _loading(config):
        tokenizer = transformers.AutoTokenizer.from_pretrained(model_path(config), **_from_where(config))
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def device_of(config: ModelConfig) -> str:
    """The device that the settings ask for.

    Raises:
        ModelError: there is no such device.
    """
    if config.device != "auto":
        if config.device.startswith("cuda") and not torch.cuda.is_available():
            raise ModelError(
                sentence("model.device", expected="a CUDA device", found="none", remedy="set model.device=cpu")
            )
        return config.device
    return "cuda" if torch.cuda.is_available() else "cpu"


def _from_where(config: ModelConfig) -> dict[str, Any]:
    """What transformers is told of a source: its revision, and to stay off the network where it can."""
    offline = os.environ.get("HF_HUB_OFFLINE", "0").lower() in {"1", "true", "yes"}
    where: dict[str, Any] = {"local_files_only": offline or Path(model_path(config)).is_dir()}
    return {**where, "revision": config.revision} if config.revision else where


@contextlib.contextmanager
def _loading(config: ModelConfig) -> Iterator[None]:
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    transformers.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ModelError(
            sentence(
                f"model.source {config.source}",
                expected="a model that transformers can load for this task",
                found=str(error).splitlines()[0],
                remedy="name a local folder, a packaged asset, or a Hub model that is reachable or cached",
            )
        ) from error
