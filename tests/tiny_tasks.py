"""A task for the random model of each architecture, and examples of unlike length for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from fedpeft.tasks import IGNORED, Task
from fedpeft.tasks.examples import mask, padded
from fedpeft.tasks.tokens import mean_loss, row_losses
from tests.tiny_models import CLASSES, WORDS


@dataclass(frozen=True)
class Toy:
    """Words, or where there are none the image that `number` draws, and a label."""

    number: int
    words: tuple[int, ...]
    label: int
    group: str = ""

    @property
    def size(self) -> int:
        return len(self.words) or 1


def examples(kind: str, lengths: Sequence[int] = (6, 4, 3), seed: int = 0) -> tuple[Toy, ...]:
    """Examples of these lengths, in order; images are all of one size."""
    random = torch.Generator().manual_seed(1 + seed)
    found = []
    for at, length in enumerate(lengths):
        words = tuple(torch.randint(3, WORDS, (0 if kind == "vit" else length,), generator=random).tolist())
        found.append(Toy(100 * seed + at, words, at % CLASSES))
    return tuple(found)


def task(kind: str) -> Task:
    """What a model of this kind is trained to do: classes, or words."""
    classes = kind in ("bert", "vit")

    def loss(model: Any, batch: Any) -> torch.Tensor:
        if classes:
            return functional.cross_entropy(model(**read(batch)).logits, batch["classes"])
        return mean_loss(*foretold(model, batch))

    def losses(model: Any, batch: Any) -> torch.Tensor:
        if classes:
            return functional.cross_entropy(model(**read(batch)).logits, batch["classes"], reduction="none")
        return row_losses(*foretold(model, batch))

    def foretold(model: Any, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        more = {"decoder_input_ids": batch["input_ids"]} if kind == "t5" else {}
        logits = model(**read(batch), **more, use_cache=False).logits[:, -batch["input_ids"].shape[1] :]
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED)
        return (logits[:, :-1], labels[:, 1:]) if kind == "llama" else (logits, labels)

    return Task((), "accuracy", _unused, _unused, collate, loss, _unused, _unused, losses=losses)


def read(batch: Any) -> dict[str, torch.Tensor]:
    """What the model reads of a batch."""
    return {key: value for key, value in batch.items() if key != "classes"}


def collate(found: Sequence[Toy], pad: int, device: torch.device) -> dict[str, torch.Tensor]:
    """The examples padded to the longest, or their images."""
    labels = {"classes": torch.tensor([one.label for one in found], device=device)}
    if not found[0].words:
        drawn = (torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(one.number)) for one in found)
        return {"pixel_values": torch.stack(list(drawn)).to(device), **labels}
    texts = [one.words for one in found]
    return {"input_ids": padded(texts, pad, device), "attention_mask": mask(texts, device), **labels}


def _unused(*_: Any) -> Any:
    raise NotImplementedError
