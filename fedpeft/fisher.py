"""Which numbers of a base an adapter trains, chosen by how much a task's loss depends on each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch

from fedpeft.adapters import AdapterState
from fedpeft.errors import PlanError, sentence
from fedpeft.evaluation import padding
from fedpeft.models import AdaptedModel, extract, install
from fedpeft.own_layers import masks, places_at, spots
from fedpeft.tasks import Encoded, Task


def with_places(adapted: AdaptedModel, task: Task, examples: Sequence[Encoded]) -> AdapterState:
    """The adapter as it was drawn, training the numbers with the greatest Fisher information on `examples`.

    The information of a number w is Σ (∂ log p(y | x) / ∂w)² over the examples with the labels that they have, in
    evaluation: the diagonal of the empirical Fisher information matrix. Numbers of all parameters are ranked
    together, of equal ones the first comes first. It takes a forward and a backward pass for each example, and
    memory for two more copies of the parameters.

    Source: Sung et al. 2021, "Training Neural Networks with Fixed Sparse Masks", section 3.1; Xu et al. 2021, "Raise
    a Child in Large Language Model", section 2.2.

    Raises:
        PlanError: there are no examples.
        DataError: the task cannot use one of them.
    """
    if not examples:
        raise PlanError(
            sentence(
                "data.server_rows",
                expected=f"rows of the server's own, by which {adapted.family.name} chooses what is trained",
                found="none",
                remedy="set it to 128, for example",
            )
        )
    install(adapted, adapted.initial)
    adapted.model.eval()
    for mask in masks(adapted.model):
        originals = [spot.original for spot in spots(mask)]
        with _needing_gradients(originals):
            scores = _information(adapted, task, examples, originals)
        with torch.no_grad():
            mask.places.data.copy_(places_at(scores, len(mask.places), balanced=mask.balanced))
    return replace(adapted.initial, tensors=extract(adapted).tensors)


def _information(
    adapted: AdaptedModel, task: Task, examples: Sequence[Encoded], parameters: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """Sums of squared gradients, one tensor a parameter."""
    sums = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in parameters]
    for example in examples:
        loss = task.loss(adapted.model, task.collate([example], padding(adapted), adapted.device))
        for total, gradient in zip(sums, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True):
            if gradient is not None:
                total.add_(gradient.float().square())
    return sums


@contextmanager
def _needing_gradients(parameters: Sequence[torch.Tensor]) -> Iterator[None]:
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)
