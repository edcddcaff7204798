"""What a task is, and which task each settings class asks for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import singledispatch
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from fedpeft.config.tasks import SequenceClassification
from fedpeft.data.rows import Row
from fedpeft.tasks import sequence_classification
from fedpeft.tasks.sequence_classification import Example


class Task(NamedTuple):
    """From rows to a loss and figures.

    `require(rows, place)` raises DataError for a row that the task cannot use; `encode(rows, tokenizer, place)`
    tokenises once; `collate(examples, pad, device)` makes a batch;
    `loss(model, batch)` is the mean over it; `score(model, batch)` gives losses and predictions one by one;
    `figures(losses, predictions, labels)` are what a journal holds.
    """

    labels: tuple[str, ...]
    require: Callable[[Sequence[Row], str], None]
    encode: Callable[[Sequence[Row], Any, str], tuple[Example, ...]]
    collate: Callable[[Sequence[Example], int, torch.device], dict[str, torch.Tensor]]
    loss: Callable[[nn.Module, Mapping[str, torch.Tensor]], torch.Tensor]
    score: Callable[[nn.Module, Mapping[str, torch.Tensor]], tuple[np.ndarray, np.ndarray]]
    figures: Callable[[np.ndarray, np.ndarray, np.ndarray], dict[str, float]]


@singledispatch
def build_task(settings: object) -> Task:
    """The task that `settings` describe."""
    raise TypeError(f"no task for settings of type {type(settings).__name__}")


@build_task.register
def _(settings: SequenceClassification) -> Task:
    def require(rows: Sequence[Row], place: str) -> None:
        sequence_classification.require_labels(rows, settings, place)

    def encode(rows: Sequence[Row], tokenizer: Any, place: str) -> tuple[Example, ...]:
        return sequence_classification.encode(rows, tokenizer, settings, place)

    def figures(losses: np.ndarray, predicted: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        return sequence_classification.figures(losses, predicted, labels, len(settings.labels))

    return Task(
        settings.labels,
        require,
        encode,
        sequence_classification.collate,
        sequence_classification.loss,
        sequence_classification.score,
        figures,
    )


@singledispatch
def with_labels(settings: object, rows: Sequence[Row]) -> object:
    """The settings with what they leave to the data filled in from `rows`."""
    raise TypeError(f"no task for settings of type {type(settings).__name__} ({len(rows)} rows)")


@with_labels.register
def _(settings: SequenceClassification, rows: Sequence[Row]) -> SequenceClassification:
    return settings if settings.labels else replace(settings, labels=tuple(sorted({row.label for row in rows})))
