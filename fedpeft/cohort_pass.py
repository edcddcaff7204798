"""One pass of the model over batches of several clients: which go together, what a task asks, and each one's loss."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from fedpeft.cohort_layers import Way, side_by_side
from fedpeft.evaluation import autocast, padding
from fedpeft.first_positions import first_alone
from fedpeft.frozen_products import by_onednn
from fedpeft.models import AdaptedModel, trained
from fedpeft.tasks import Encoded, Task

_LEAST_FULL = 0.6
"""The least share of a pass's rows, and of its tokens, that a client has to fill, where a pass is large."""

_SMALL_TOKENS = 512
"""Passes of no more tokens are not split for the sake of padding."""


@dataclass
class Part:
    """One client's batch in a pass; `stream` is the state of the client's own random draws, before it and after."""

    examples: Sequence[Encoded]
    stream: torch.Tensor


def passes(sizes: Sequence[tuple[int, int]], most: int) -> list[list[int]]:
    """Which clients go through the model together, by number, from the (rows, longest row) that each brings.

    Those of like length do; a pass holds at most `most` tokens, padding counted, or one client.
    """
    found: list[list[int]] = []
    order = sorted(range(len(sizes)), key=lambda at: (-sizes[at][1], -sizes[at][0], at))
    for at in order:
        fitting = (each for each in found if _fits([sizes[other] for other in (*each, at)], most))
        if (each := next(fitting, None)) is not None:
            each.append(at)
        else:
            found.append([at])
    return [sorted(each) for each in found]


def _fits(sizes: Sequence[tuple[int, int]], most: int) -> bool:
    rows, widths = zip(*sizes, strict=True)
    padded = len(sizes) * max(rows) * max(widths)
    full = min(rows) >= _LEAST_FULL * max(rows) and min(widths) >= _LEAST_FULL * max(widths)
    return bool(padded <= most and (full or padded <= _SMALL_TOKENS))


def losses_of_parts(
    adapted: AdaptedModel, task: Task, parts: Sequence[Part], own: Mapping[str, torch.Tensor], way: Way
) -> list[torch.Tensor]:
    """The loss of each client's batch, a scalar each, all from one pass of the model.

    `own` are the clients' numbers, `(clients, *shape)`, by what `models.trained` calls their parameter.
    """
    rows = max(len(part.examples) for part in parts)
    every = [example for part in parts for example in part.examples]
    whole = task.collate(every, padding(adapted), adapted.device)
    ends = np.cumsum([0, *(len(part.examples) for part in parts)]).tolist()
    batches = [{key: value[start:end] for key, value in whole.items()} for start, end in pairwise(ends)]
    model: Any = adapted.model
    with autocast(adapted):
        asked = [_asked(part, model, task, batch) for part, batch in zip(parts, batches, strict=True)]
        stacks = {id(parameter): own[key] for key, parameter in trained(adapted).items()}
        with by_onednn(model, stacks), first_alone(model), side_by_side(model, stacks, rows, way):
            answer = model(**_below(asked, rows))
        found = []
        for at, (part, batch) in enumerate(zip(parts, batches, strict=True)):
            answering: Any = _Answering(model, answer, slice(at * rows, at * rows + len(part.examples)))
            found.append(task.loss(answering, batch))
        return found


class _Reached(Exception):
    """The task has asked the model."""


@dataclass(frozen=True)
class _Asking:
    """Stands for the model, and notes what the task asks of it."""

    model: Any
    asked: dict[str, Any]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def __call__(self, **kwargs: Any) -> Any:
        self.asked.update(kwargs)
        raise _Reached


@dataclass(frozen=True)
class _Answering:
    """Stands for the model, and answers a task with its own rows of what the model said."""

    model: Any
    answer: Any
    rows: slice

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def __call__(self, **kwargs: Any) -> Any:
        del kwargs
        return _Rows(self.answer, self.rows)


@dataclass(frozen=True)
class _Rows:
    """Some rows of what a model said."""

    answer: Any
    rows: slice

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.answer, name)
        return value[self.rows] if isinstance(value, torch.Tensor) else value


def _asked(part: Part, model: Any, task: Task, batch: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """What the task asks of the model for this client's batch; what it draws comes from the client's own stream."""
    asking: Any = _Asking(model, {})
    torch.set_rng_state(part.stream)
    with contextlib.suppress(_Reached):
        task.loss(asking, batch)
    part.stream = torch.get_rng_state()
    found: dict[str, Any] = asking.asked
    return found


def _below(asked: Sequence[Mapping[str, Any]], rows: int) -> dict[str, Any]:
    """The arguments of all members, `rows` of each, one below the other; the last row is repeated where one lacks."""
    found: dict[str, Any] = {}
    for key, value in asked[0].items():
        each = [one[key] for one in asked]
        if isinstance(value, torch.Tensor):
            found[key] = torch.cat([torch.cat([one, one[-1:].expand(rows - len(one), *one.shape[1:])]) for one in each])
        else:
            found[key] = value
    return found
