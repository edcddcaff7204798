"""The frozen base and what reads its input, a tokenizer or an image processor, as transformers loads them."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING
from transformers.utils.hub import cached_file

from fedpeft.assets import resolve
from fedpeft.base_weights import HEADS, checkpoint_digest, keep_less, loading_arguments
from fedpeft.config.tasks import Head
from fedpeft.config.training import ModelConfig
from fedpeft.errors import ModelError, sentence
from fedpeft.files import write_atomically

_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
"""Where a base says how it sees images: the first that is there."""

_BILINEAR, _COLOURS, _USUAL_SIZE = 2, 3, 224


def model_path(config: ModelConfig) -> str:
    """The folder or Hub name that `config.source` stands for."""
    if config.source.startswith("asset:"):
        return str(resolve(config.source.removeprefix("asset:")))
    return config.source


def load_base(config: ModelConfig, head: Head, pad: int) -> nn.Module:
    """The base that `config` names, with the head that a task needs, held as the settings say.

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
            source, config=settings, **loading_arguments(config, device_of(config), HEADS), **_from_where(config)
        )
    keep_less(base, config)
    return base


def digest_of(config: ModelConfig, base: nn.Module) -> str:
    """What tells the base from others, whatever format it is held in; empty where its files are not safetensors."""
    folder = Path(model_path(config))
    if folder.is_dir():
        files = sorted(folder.glob("*.safetensors"))
    else:
        found = cached_file(
            model_path(config), "model.safetensors", _raise_exceptions_for_missing_entries=False, **_from_where(config)
        )
        files = [Path(found)] if found else []
    return checkpoint_digest(files, [name for name, _ in base.named_parameters()]) if files else ""


@dataclass(frozen=True)
class ImageProcessor:
    """How a base sees images, where others have a tokenizer: its `size` in pixels a side, and of each colour what.

    A value of 0 to 255 is multiplied by `scale`; then comes less `mean`, over `std`. There is no padding, which 0
    stands for.
    """

    size: int
    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    pad_token_id: int = 0

    def save_pretrained(self, folder: str) -> None:
        """`folder` holds the settings in the layout that transformers' `AutoImageProcessor` loads."""
        settings = {
            "image_processor_type": "ViTImageProcessor",
            **{f"do_{step}": True for step in ("convert_rgb", "resize", "rescale", "normalize")},
            "size": {"height": self.size, "width": self.size},
            "resample": _BILINEAR,
            "rescale_factor": self.scale,
            "image_mean": self.mean,
            "image_std": self.std,
        }
        write_atomically(Path(folder) / _PROCESSOR_FILES[0], json.dumps(settings, indent=2).encode())


def load_tokenizer(config: ModelConfig) -> Any:
    """The tokenizer of the base that `config` names, able to pad, or its image processor if it reads images.

    Raises:
        ModelError: there is none.
    """
    with _loading(config):
        settings = transformers.AutoConfig.from_pretrained(model_path(config), **_from_where(config))
        if type(settings) in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING:
            return _image_processor(config, getattr(settings, "image_size", 0))
        tokenizer = transformers.AutoTokenizer.from_pretrained(model_path(config), **_from_where(config))
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _image_processor(config: ModelConfig, image_size: int | Sequence[int]) -> ImageProcessor:
    """The processor that the base's own file tells of; without one, colours go from -1 to 1 at the size of the base."""
    found: dict[str, Any] = {}
    for name in _PROCESSOR_FILES:
        path = cached_file(model_path(config), name, _raise_exceptions_for_missing_entries=False, **_from_where(config))
        if path and not found:
            read = json.loads(Path(path).read_text(encoding="utf-8"))
            found = read.get("image_processor", read)
    normal, crop = found.get("do_normalize", True), found.get("crop_size") if found.get("do_center_crop") else None
    sides = crop or found.get("size") or image_size or _USUAL_SIZE
    return ImageProcessor(
        size=_side(sides),
        scale=float(found.get("rescale_factor", 1 / 255)) if found.get("do_rescale", True) else 1.0,
        mean=_colours(found.get("image_mean", 0.5) if normal else 0.0),
        std=_colours(found.get("image_std", 0.5) if normal else 1.0),
    )


def _side(sides: Any) -> int:
    """One number of what settings give as a number, as height and width, or by names."""
    values = list(sides.values()) if isinstance(sides, Mapping) else sides
    return int(values if isinstance(values, int | float) else max(values))


def _colours(values: Any) -> tuple[float, ...]:
    """Three numbers, of three or of one."""
    found = tuple(map(float, values)) if isinstance(values, list | tuple) else (float(values),)
    return found if len(found) == _COLOURS else found[:1] * _COLOURS


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


def cores_for(config: ModelConfig) -> int:
    """How many processes can compute with the base at once: one for each core, or one on a GPU."""
    return (os.cpu_count() or 1) if device_of(config) == "cpu" else 1


def _from_where(config: ModelConfig) -> dict[str, Any]:
    """What transformers is told of a source: its revision, no network if it can do without, and no code of its own."""
    offline = os.environ.get("HF_HUB_OFFLINE", "0").lower() in {"1", "true", "yes"}
    local = offline or Path(model_path(config)).is_dir()
    where: dict[str, Any] = {"local_files_only": local, "trust_remote_code": False}
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
