"""Sequence classification: one label for each text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from fedpeft.config.tasks import SequenceClassification
from fedpeft.data.rows import Row
from fedpeft.errors import DataError, sentence


@dataclass(frozen=True)
class Example:
    """A tokenised text: its token ids, the index of its label, and its natural group."""

    tokens: tuple[int, ...]
    label: int
    group: str


def encode(rows: Sequence[Row], tokenizer: Any, settings: SequenceClassification, place: str) -> tuple[Example, ...]:
    """The rows tokenised, each cut at `max_tokens`.

    Raises:
        DataError: a row's label is not among the task's labels.
    """
    require_labels(rows, settings, place)
    numbers = {name: number for number, name in enumerate(settings.labels)}
    if not rows:
        return ()
    limit = min(settings.max_tokens, tokenizer.model_max_length)
    ids = tokenizer([row.text for row in rows], truncation=True, max_length=limit)["input_ids"]
    return tuple(Example(tuple(ids[i]), numbers[row.label], row.group) for i, row in enumerate(rows))


def require_labels(rows: Sequence[Row], settings: SequenceClassification, place: str) -> None:
    """Raises DataError, naming the row, if a label is not among the task's."""
    for at, row in enumerate(rows):
        if row.label not in settings.labels:
            raise DataError(
                sentence(
                    f"{place}, row {at + 1}",
                    expected=f"one of the labels {', '.join(settings.labels)}",
                    found=repr(row.label),
                    remedy="correct the row, or name the label in task.sequence_classification.labels",
                )
            )


def collate(examples: Sequence[Example], pad: int, device: torch.device) -> dict[str, torch.Tensor]:
    """A batch padded to its longest text: `input_ids` and `attention_mask` (batch, tokens), `labels` (batch)."""
    width = max(len(example.tokens) for example in examples)
    ids = np.full((len(examples), width), pad, np.int64)
    mask = np.zeros((len(examples), width), np.int64)
    for at, example in enumerate(examples):
        ids[at, : len(example.tokens)] = example.tokens
        mask[at, : len(example.tokens)] = 1
    labels = np.array([example.label for example in examples], np.int64)
    arrays = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return {key: torch.from_numpy(array).to(device) for key, array in arrays.items()}


def loss(model: nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The mean cross-entropy of a batch, a scalar."""
    return functional.cross_entropy(_logits(model, batch), batch["labels"])


def score(model: nn.Module, batch: Mapping[str, torch.Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """The cross-entropy and the predicted label of each text of a batch, both `(batch,)`."""
    logits = _logits(model, batch)
    losses = functional.cross_entropy(logits, batch["labels"], reduction="none")
    return losses.cpu().numpy().astype(np.float64), logits.argmax(-1).cpu().numpy()


def figures(losses: np.ndarray, predicted: np.ndarray, labels: np.ndarray, classes: int) -> dict[str, float]:
    """Mean loss, accuracy and macro F1 (over the classes that occur or are predicted), and the number of rows."""
    confusion = np.zeros((classes, classes))
    np.add.at(confusion, (labels, predicted), 1)
    hits, true, guessed = np.diag(confusion), confusion.sum(1), confusion.sum(0)
    present = (true + guessed) > 0
    f1 = 2 * hits[present] / (true + guessed)[present]
    return {
        "loss": float(losses.mean()),
        "accuracy": float(hits.sum() / len(labels)),
        "macro_f1": float(f1.mean()),
        "rows": len(labels),
    }


def _logits(model: nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    logits: torch.Tensor = output.logits.float()
    return logits
