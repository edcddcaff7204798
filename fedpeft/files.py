"""Files that are either wholly there or not there at all."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

_METADATA_KEY = "fedpeft"


def write_atomically(path: Path, data: bytes, mode: int = 0o644) -> None:
    """`path` holds exactly `data`, on disk, with the permissions `mode`; on any failure it holds what it held before.

    Raises:
        OSError: the disk is full or not writable; no partial file is left behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            os.fchmod(handle, mode)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise
    _sync_folder(path.parent)


def encode_tensors(tensors: Mapping[str, np.ndarray], fields: Mapping[str, Any]) -> bytes:
    """The bytes of a safetensors file whose metadata carries `fields` as JSON."""
    text = json.dumps(fields, sort_keys=True)
    plain = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
    return bytes(save(plain, metadata={_METADATA_KEY: text}))


def read_tensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Tensors and fields of a file that `encode_tensors` made.

    Raises:
        ValueError: the file is truncated, altered in its header, or was not written by fedpeft.
    """
    try:
        with safe_open(str(path), framework="numpy") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return tensors, json.loads(metadata[_METADATA_KEY])
    except (SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(str(error)) from error


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
