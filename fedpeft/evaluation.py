"""Evaluation of an adapter, or of the base without one, on a task's examples."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from fedpeft.errors import DataError, sentence
from fedpeft.first_positions import first_alone
from fedpeft.frozen_products import by_onednn
from fedpeft.models import AdaptedModel, install
from fedpeft.own_layers import disabled
from fedpeft.tasks import Encoded, Sample, Statistics, Task


def evaluate(adapted: AdaptedModel, task: Task, examples: Sequence[Encoded], batch_size: int) -> dict[str, Any]:
    """Figures over all examples, and under `groups` over those of each natural group.

    Raises:
        DataError: there are no examples.
    """
    if not examples:
        raise DataError(
            sentence("evaluation", expected="at least one row", found="none", remedy="raise data.test_fraction")
        )
    found = _scored(adapted, task, examples, batch_size)
    groups = np.array([example.group for example in examples])
    names = sorted({name for name in groups.tolist() if name})
    of_group = {name: {key: values[groups == name] for key, values in found.items()} for name in names}
    return {**task.figures(found), "groups": {name: task.figures(of_group[name]) for name in names}}


def evaluate_base(adapted: AdaptedModel, task: Task, examples: Sequence[Encoded], batch_size: int) -> dict[str, Any]:
    """Figures of the base alone, without any adapter, over all examples and over those of each group."""
    install(adapted, adapted.initial)
    with disabled(adapted.model):
        return evaluate(adapted, task, examples, batch_size)


def sampled(adapted: AdaptedModel, task: Task, examples: Sequence[Encoded]) -> tuple[Sample, ...]:
    """What the model now answers to each example; nothing where the task has no answers in words."""
    if task.samples is None:
        return ()
    adapted.model.eval()
    with torch.inference_mode(), autocast(adapted), leanly(adapted):
        return task.samples(adapted.model, adapted.tokenizer, examples)


def padding(adapted: AdaptedModel) -> int:
    """The number that stands for padding; 0 where what reads the input is no tokenizer."""
    return int(getattr(adapted.tokenizer, "pad_token_id", None) or 0)


def autocast(adapted: AdaptedModel) -> Any:
    """Inside, torch computes in the precision that the model is to have."""
    enabled = adapted.precision != torch.float32
    return torch.autocast(adapted.device.type, dtype=adapted.precision if enabled else None, enabled=enabled)


@contextlib.contextmanager
def leanly(adapted: AdaptedModel) -> Iterator[None]:
    """Inside, frozen products are oneDNN's, and no position is computed that nobody reads."""
    with by_onednn(adapted.model, ()), first_alone(adapted.model):
        yield


def _scored(adapted: AdaptedModel, task: Task, examples: Sequence[Encoded], batch_size: int) -> Statistics:
    """The task's statistics of every example, in order; batches hold examples of like size."""
    order = sorted(range(len(examples)), key=lambda i: examples[i].size)
    found: dict[str, np.ndarray] = {}
    adapted.model.eval()
    with torch.inference_mode(), autocast(adapted), leanly(adapted):
        for start in range(0, len(order), batch_size):
            at = order[start : start + batch_size]
            batch = task.collate([examples[i] for i in at], padding(adapted), adapted.device)
            for key, values in task.score(adapted.model, batch).items():
                found.setdefault(key, np.zeros((len(examples), *values.shape[1:]), values.dtype))[at] = values
    return found
