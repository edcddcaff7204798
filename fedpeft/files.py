"""Files that are either wholly there or not there at all."""

from __future__ import annotations

import contextlib
import hashlib
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
    """The bytes of a safetensors file whose metadata carries `fields` as JSON, and a digest of it all."""
    plain = {name: np.asarray(value, order="C") for name, value in tensors.items()}
    text = json.dumps({"fields": fields, "sha256": _digest(plain, fields)}, sort_keys=True)
    return bytes(save(plain, metadata={_METADATA_KEY: text}))


def read_tensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Tensors and fields of a file that `encode_tensors` made.

    Raises:
        ValueError: the file is truncated or altered, or was not written by fedpeft.
    """
    try:
        with safe_open(str(path), framework="numpy") as file:
            metadata = json.loads((file.metadata() or {})[_METADATA_KEY])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        fields, expected = dict(metadata["fields"]), metadata["sha256"]
    except (SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(str(error)) from error
    if _digest(tensors, fields) != expected:
        raise ValueError("other contents than were written (corrupt)")
    return tensors, fields


def _digest(tensors: Mapping[str, np.ndarray], fields: Mapping[str, Any]) -> str:
    sha = hashlib.sha256(json.dumps(fields, sort_keys=True).encode())
    for name, value in sorted(tensors.items()):
        sha.update(f"{name}{value.dtype.str}{value.shape}".encode() + value.tobytes())
    return sha.hexdigest()


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
