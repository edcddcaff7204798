"""Own layers in a folder: which methods with what settings as JSON, and their tensors as safetensors.

It is for what no stock peft loads. Tensors keep the names that they have in the base, so that a base alone and the
same base under an adapter of peft's read each other's folders.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fedpeft.errors import AdapterError, ModelError, sentence
from fedpeft.files import encode_tensors, read_tensors, write_atomically
from fedpeft.own_layers.install import install, remove
from fedpeft.own_layers.layers import base_of, canonical, trainable
from fedpeft.own_layers.settings import method_of, settings_of

SETTINGS, TENSORS = "own_layers.json", "own_layers.safetensors"
"""The two files of a folder."""

_FORMAT = 1

Installed = Sequence[tuple[str, Mapping[str, Any]]]
"""The methods on a base and the settings of each, in the order in which they were installed."""


def save(model: nn.Module, folder: Path, settings: Installed) -> None:
    """`folder` holds the tensors of the methods on `model` and `settings`, what they were installed with.

    A tensor that is not of float32 or float64 is stored as float32.

    Raises:
        ModelError: a method or a setting is unknown.
        OSError: the disk is full or not writable.
    """
    for method, given in settings:
        settings_of(method_of(method), given)
    layers = [{"method": method, "settings": dict(given)} for method, given in settings]
    text = json.dumps({"format": _FORMAT, "layers": layers}, indent=2, sort_keys=True)
    write_atomically(folder / SETTINGS, f"{text}\n".encode())
    tensors = {canonical(name): _array(parameter) for name, parameter in trainable(base_of(model)).items()}
    write_atomically(folder / TENSORS, encode_tensors(tensors, {}))


def load(base: nn.Module, folder: Path) -> list[tuple[str, dict[str, Any]]]:
    """`base`, frozen and without any method of ours, has those that `folder` holds; returned is what they are.

    Torch's global generator is left where it stands. On an error the base is as it was.

    Raises:
        AdapterError: the folder is not one that `save` wrote, or its tensors do not fit the base.
        ModelError: a method does not fit the base.
    """
    layers = _read_settings(folder / SETTINGS)
    tensors = _read(folder / TENSORS)
    try:
        with torch.random.fork_rng(devices=[]):
            for method, settings in layers:
                install(base, method, settings)
        wanted = {canonical(name): parameter for name, parameter in trainable(base).items()}
        _require(tensors, wanted, folder / TENSORS)
    except (AdapterError, ModelError):
        remove(base)
        raise
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter.copy_(torch.from_numpy(tensors[name]))
    return layers


def _array(parameter: nn.Parameter) -> np.ndarray:
    value = parameter.detach().cpu()
    wide = value if value.dtype in (torch.float32, torch.float64) else value.float()
    return np.array(wide.numpy())


def _read(path: Path) -> dict[str, np.ndarray]:
    try:
        return read_tensors(path)[0]
    except (OSError, ValueError) as error:
        raise _unreadable(path, str(error).splitlines()[0]) from error


def _read_settings(path: Path) -> list[tuple[str, dict[str, Any]]]:
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        if fields["format"] != _FORMAT:
            raise _unreadable(path, f"format {fields['format']!r}")
        return [(str(layer["method"]), dict(layer["settings"])) for layer in fields["layers"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _unreadable(path, f"{type(error).__name__}: {error}".splitlines()[0]) from error


def _require(tensors: Mapping[str, np.ndarray], wanted: Mapping[str, nn.Parameter], path: Path) -> None:
    odd = sorted(tensors.keys() ^ wanted.keys())
    if odd:
        what = "missing" if odd[0] in wanted else "unknown"
        raise AdapterError(
            sentence(
                str(path),
                expected=f"the {len(wanted)} tensors that the settings call for",
                found=f"{len(odd)} missing or unknown, such as {odd[0]!r}, which is {what}",
                remedy="use the folder as it was saved, and the base model that it was made with",
            )
        )
    for name, parameter in wanted.items():
        value = tensors[name]
        if value.shape != tuple(parameter.shape) or value.dtype.kind != "f" or not np.isfinite(value).all():
            raise AdapterError(
                sentence(
                    f"{path}, tensor {name}",
                    expected=f"finite numbers of shape {tuple(parameter.shape)}",
                    found=f"{value.dtype} of shape {value.shape}",
                    remedy="use the folder as it was saved, and the base model that it was made with",
                )
            )


def _unreadable(path: Path, found: str) -> AdapterError:
    remedy = "save the adapter again"
    return AdapterError(sentence(str(path), expected="a file of own layers", found=found, remedy=remedy))
