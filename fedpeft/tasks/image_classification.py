"""Image classification: one label for each image."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from fedpeft.config.tasks import ImageClassification
from fedpeft.data.fields import Row, Value
from fedpeft.data.images import pixels
from fedpeft.errors import DataError, ModelError, PlanError, sentence
from fedpeft.tasks.sequence_classification import figures, statistics
from fedpeft.tasks.task import Batch, Statistics, Task

_STRETCH = "interpolate_pos_encoding"


@dataclass(frozen=True)
class Look:
    """How a model sees an image: `side` pixels square, times `scale`, less `mean`, over `std` of each colour."""

    side: int
    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True)
class Picture:
    """Where an image is, how the model sees it, the index of its label, and its natural group.

    The pixels are read for each batch anew, so that memory does not grow with the rows.
    """

    image: Value
    look: Look
    label: int
    group: str

    @property
    def size(self) -> int:
        """One: all images take up as much of a batch."""
        return 1


def build(settings: ImageClassification) -> Task:
    """The task that `settings` describe."""
    return Task(
        labels=settings.labels,
        metric=settings.metrics[0],
        require=lambda rows, place: require_images(rows, settings, place),
        encode=lambda rows, processor, place: encode(rows, processor, settings, place),
        collate=collate,
        loss=partial(loss, flip=settings.flip),
        score=score,
        figures=partial(figures, classes=len(settings.labels)),
        admit=partial(admit, side=settings.image_size) if settings.image_size else None,
        losses=partial(losses, flip=settings.flip),
    )


def require_images(rows: Sequence[Row], settings: ImageClassification, place: str) -> None:
    """Raises DataError, naming the row, if it has no image or a label that is not among the task's."""
    for at, row in enumerate(rows):
        if row.label not in settings.labels or not row.fields.get("image"):
            known = f"an image, and one of the labels {', '.join(settings.labels)}"
            remedy = "correct the row, or name the label in task.image_classification.labels"
            found = repr(row.label) if row.fields.get("image") else "no image"
            raise DataError(sentence(f"{place}, row {at + 1}", expected=known, found=found, remedy=remedy))


def encode(rows: Sequence[Row], processor: Any, settings: ImageClassification, place: str) -> tuple[Picture, ...]:
    """Where each row's image is and how it is to be seen; no pixel is read yet.

    Raises:
        DataError: a row has no image, or a label that is not among the task's.
        ModelError: the base reads no images.
    """
    require_images(rows, settings, place)
    if not hasattr(processor, "mean"):
        raise ModelError(
            sentence("model.source", expected="a base that reads images", found="one of texts", remedy="name another")
        )
    numbers = {name: number for number, name in enumerate(settings.labels)}
    look = Look(settings.image_size or processor.size, processor.scale, processor.mean, processor.std)
    return tuple(Picture(row.fields["image"], look, numbers[row.label], row.group) for row in rows)


def collate(examples: Sequence[Picture], pad: int, device: torch.device) -> dict[str, torch.Tensor]:  # noqa: ARG001
    """A batch: `pixel_values` (batch, 3, side, side), scaled and normalised, and `labels` (batch)."""
    look = examples[0].look
    images = torch.stack([resized(pixels(example.image), look.side) for example in examples]).to(device)
    mean, std = (torch.tensor(values, device=device)[:, None, None] for values in (look.mean, look.std))
    labels = np.array([example.label for example in examples], np.int64)
    return {
        "pixel_values": (images * look.scale - mean) / std,
        "labels": torch.from_numpy(labels).to(device),
    }


def resized(image: np.ndarray, side: int) -> torch.Tensor:
    """An image `(height, width, 3)` as `(3, side, side)` in float32, its values still whole numbers up to 255.

    Bilinear, averaging where it shrinks; what is not square is squeezed.
    """
    found = torch.from_numpy(np.array(image)).permute(2, 0, 1).float()
    if found.shape[1:] == (side, side):
        return found
    return functional.interpolate(found[None], (side, side), mode="bilinear", antialias=True)[0].round()


def loss(model: nn.Module, batch: Batch, *, flip: bool) -> torch.Tensor:
    """The mean cross-entropy of a batch, a scalar; with `flip`, each image is mirrored with probability 1/2.

    The coins are torch's, whose generator a client sets for each of its rounds; in evaluation none is thrown.
    """
    return functional.cross_entropy(_logits(model, _seen(model, batch, flip=flip)), batch["labels"])


def losses(model: nn.Module, batch: Batch, *, flip: bool) -> torch.Tensor:
    """The cross-entropy of each image, `(batch,)`, some of them mirrored as for `loss`."""
    return functional.cross_entropy(_logits(model, _seen(model, batch, flip=flip)), batch["labels"], reduction="none")


def score(model: nn.Module, batch: Batch) -> Statistics:
    """The cross-entropy `loss`, the `predicted` and the true `label` of each image of a batch, each `(batch,)`."""
    return statistics(_logits(model, batch["pixel_values"]), batch["labels"])


def admit(model: nn.Module, side: int) -> None:
    """Raises PlanError if `model` takes no images of `side` pixels a side."""
    blank = torch.zeros(1, 3, side, side, device=next(model.parameters()).device)
    model.eval()
    try:
        with torch.inference_mode():
            _logits(model, blank)
    except (ValueError, RuntimeError) as error:
        raise PlanError(
            sentence(
                "task.image_classification.image_size",
                expected="a size that the base takes",
                found=f"{side}: {str(error).splitlines()[0].rstrip('.')}",
                remedy="set it to a multiple of the base's patch, or to 0",
            )
        ) from error


def _seen(model: nn.Module, batch: Batch, *, flip: bool) -> torch.Tensor:
    """The images of a batch, in training with `flip` each mirrored or not."""
    images = batch["pixel_values"]
    if not (flip and model.training):
        return images
    mirrored = (torch.rand(len(images)) < 0.5).to(images.device)[:, None, None, None]
    return torch.where(mirrored, images.flip(-1), images)


def _logits(model: Any, images: torch.Tensor) -> torch.Tensor:
    """What the model says of images; some stretch their positions over another size only where they are told to."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    told = {_STRETCH: True} if _STRETCH in inspect.signature(inner.forward).parameters else {}
    logits: torch.Tensor = model(pixel_values=images, **told).logits.float()
    return logits
