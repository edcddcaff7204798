"""The files of a plain Hugging Face folder, byte for byte the same whenever they are written from the same values."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

# numpy has no bfloat16, so its bits travel as uint16.
_DTYPES = {"float32": "F32", "uint16": "BF16"}


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """The bits, as uint16, of the bfloat16 numbers nearest to finite `values`; of two equally near, the even one."""
    bits = np.ascontiguousarray(values, dtype="<f4").view("<u4")
    nearest: np.ndarray = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return nearest.astype("<u2")


def save_weights(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """`path` is a safetensors file of `tensors`: float32, or bfloat16 where an array is `to_bfloat16`'s."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, values in sorted(tensors.items()):
        end = at + values.nbytes
        header[name] = {"dtype": _DTYPES[values.dtype.name], "shape": values.shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, values in sorted(tensors.items()):
            file.write(np.ascontiguousarray(values).data)


def save_json(path: Path, fields: Mapping[str, Any]) -> None:
    """`path` holds `fields` as JSON that people can read."""
    path.write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
