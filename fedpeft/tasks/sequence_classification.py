"""Sequence classification: one label for each text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from fedpeft.config.tasks import SequenceClassification
from fedpeft.data.fields import Row
from fedpeft.errors import DataError, sentence
from fedpeft.tasks.examples import Example, mask, padded
from fedpeft.tasks.task import Statistics, Task


def build(settings: SequenceClassification) -> Task:
    """The task that `settings` describe."""
    return Task(
        labels=settings.labels,
        metric=settings.metrics[0],
        require=lambda rows, place: require_labels(rows, settings, place),
        encode=lambda rows, tokenizer, place: encode(rows, tokenizer, settings, place),
        collate=collate,
        loss=loss,
        score=score,
        figures=partial(figures, classes=len(settings.labels)),
        losses=losses,
    )


def complete(settings: SequenceClassification, rows: Sequence[Row]) -> SequenceClassification:
    """The settings with the labels of `rows`, sorted, where they name none."""
    return settings if settings.labels else replace(settings, labels=tuple(sorted({row.label for row in rows})))


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
    texts = [example.tokens for example in examples]
    labels = np.array([example.label for example in examples], np.int64)
    return {
        "input_ids": padded(texts, pad, device),
        "attention_mask": mask(texts, device),
        "labels": torch.from_numpy(labels).to(device),
    }


def loss(model: nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The mean cross-entropy of a batch, a scalar."""
    return functional.cross_entropy(_logits(model, batch), batch["labels"])


def losses(model: nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The cross-entropy of each text, `(batch,)`."""
    return functional.cross_entropy(_logits(model, batch), batch["labels"], reduction="none")


def score(model: nn.Module, batch: Mapping[str, torch.Tensor]) -> Statistics:
    """The cross-entropy `loss`, the `predicted` and the true `label` of each text of a batch, each `(batch,)`."""
    return statistics(_logits(model, batch), batch["labels"])


def statistics(logits: torch.Tensor, labels: torch.Tensor) -> Statistics:
    """What `score` says, of logits `(batch, labels)` and labels `(batch,)`."""
    losses = functional.cross_entropy(logits, labels, reduction="none")
    return {
        "loss": losses.cpu().numpy().astype(np.float64),
        "predicted": logits.argmax(-1).cpu().numpy(),
        "label": labels.cpu().numpy(),
    }


def figures(statistics: Statistics, classes: int) -> dict[str, float]:
    """Mean loss, accuracy and macro F1 (over the classes that occur or are predicted), and the number of rows."""
    labels = statistics["label"]
    confusion = np.zeros((classes, classes))
    np.add.at(confusion, (labels, statistics["predicted"]), 1)
    hits, true, guessed = np.diag(confusion), confusion.sum(1), confusion.sum(0)
    present = (true + guessed) > 0
    f1 = 2 * hits[present] / (true + guessed)[present]
    return {
        "loss": float(statistics["loss"].mean()),
        "accuracy": float(hits.sum() / len(labels)),
        "macro_f1": float(f1.mean()),
        "rows": len(labels),
    }


def _logits(model: nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    logits: torch.Tensor = output.logits.float()
    return logits
