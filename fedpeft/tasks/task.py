"""What a task is, and which task each settings class asks for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from fedpeft.data.fields import Row
from fedpeft.tasks.examples import Encoded

Statistics = Mapping[str, np.ndarray]
"""What was measured of examples one by one, by name: the first axis of each array is the example."""

Batch = Mapping[str, torch.Tensor]
"""What `collate` makes of examples, by the name that `loss` and `score` know it by."""


class Task(NamedTuple):
    """From rows to a loss and figures.

    `labels` are the outputs of the head in order, if it has any; `metric` names the main figure.
    `require(rows, place)` raises DataError for a row that the task cannot use; `encode(rows, tokenizer, place)`
    encodes once; `collate(examples, pad, device)` makes a batch, as wide as its longest example;
    `loss(model, batch)` is a scalar, the mean over it; `score(model, batch)` gives statistics one by one;
    `figures(statistics)` makes of those of many batches what a journal holds, `rows` and `loss` among it.
    `samples(model, tokenizer, examples)`, where there is one, says for each example what the model answers;
    `admit(model)`, where there is one, raises PlanError for a model that the task cannot be trained on.
    `losses(model, batch)`, where there is one, are those of a batch's examples `(examples,)`, each the mean over what
    is learned of it alone, so that none depends on another example; that of a batch of one is its `loss`. An example is
    `copies` rows of a batch, which has the first rows of all examples in order, then their next ones.
    The model is whatever peft made of the base, so a loss may also run it with its adapter switched off.
    """

    labels: tuple[str, ...]
    metric: str
    require: Callable[[Sequence[Row], str], None]
    encode: Callable[[Sequence[Row], Any, str], tuple[Any, ...]]
    collate: Callable[[Sequence[Any], int, torch.device], Batch]
    loss: Callable[[nn.Module, Batch], torch.Tensor]
    score: Callable[[nn.Module, Batch], Statistics]
    figures: Callable[[Statistics], dict[str, float]]
    samples: Callable[[nn.Module, Any, Sequence[Any]], tuple[Sample, ...]] | None = None
    admit: Callable[[nn.Module], None] | None = None
    losses: Callable[[nn.Module, Batch], torch.Tensor] | None = None
    copies: int = 1


class Sample(NamedTuple):
    """What a model was given, what it was to answer, and what it answered."""

    given: str
    expected: str
    answered: str


class Builder(NamedTuple):
    """How settings become a task, and how what they leave to the data is filled in from rows."""

    build: Callable[[Any], Task]
    complete: Callable[[Any, Sequence[Row]], Any] = lambda settings, rows: settings  # noqa: ARG005


__all__ = ["Batch", "Builder", "Encoded", "Sample", "Statistics", "Task"]
