"""What a federation adds to a client's own gradients: corrections, a pull to the start, a penalty on last ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from fedpeft.client import FitJob
from fedpeft.merges import Pruning
from fedpeft.pruning import kept_rank

_TINY = 1e-12
"""The least norm that a gradient is divided by."""


@dataclass(frozen=True)
class Pull:
    """What is added to the gradients of a step, and the sums of the gradients before it, by tensor."""

    terms: tuple[Callable[[], None], ...]
    gradients: Mapping[str, torch.Tensor]


def pull_of(parameters: Mapping[str, nn.Parameter], proximal: float, job: FitJob) -> Pull:
    """The terms that a federation adds to a client's own gradients; each adds to `.grad` in place."""
    terms: list[Callable[[], None]] = []
    sums = {key: torch.zeros_like(parameters[key]) for key in job.correction if key in parameters}
    if sums:
        corrections = {key: torch.from_numpy(job.correction[key]).to(sums[key]) for key in sums}
        terms.append(lambda: _correct(parameters, corrections, sums))
    if proximal:
        anchors = {key: parameter.detach().clone() for key, parameter in parameters.items()}
        terms.append(lambda: _attract(parameters, anchors, proximal))
    if job.pruning:
        terms.append(lambda: shrink_tails(parameters, job.pruning))
    return Pull(tuple(terms), sums)


def _correct(
    parameters: Mapping[str, nn.Parameter], corrections: Mapping[str, torch.Tensor], sums: Mapping[str, torch.Tensor]
) -> None:
    for key, total in sums.items():
        gradient = parameters[key].grad
        if gradient is None:
            parameters[key].grad = corrections[key].clone()
        else:
            total.add_(gradient)
            gradient.add_(corrections[key])


def _attract(parameters: Mapping[str, nn.Parameter], anchors: Mapping[str, torch.Tensor], strength: float) -> None:
    for key, anchor in anchors.items():
        gradient = parameters[key].grad
        if gradient is not None:
            gradient.add_(parameters[key].detach() - anchor, alpha=strength)


def shrink_tails(parameters: Mapping[str, nn.Parameter], pruning: Pruning | None) -> None:
    """Adds the gradient of penalty × Σ ‖B[:, kept:]‖ ‖A[kept:]‖; the gradient of a norm at zero is taken as zero."""
    for key, a in parameters.items():
        b = parameters.get(f"{key.removesuffix('.A')}.B")
        if pruning is None or b is None or not key.endswith(".A") or a.grad is None or b.grad is None:
            continue
        kept = kept_rank(a.shape[0], pruning)
        rows, columns = a.detach()[kept:], b.detach()[:, kept:]
        size_a, size_b = rows.norm(), columns.norm()
        a.grad[kept:] += pruning.penalty * size_b * rows / size_a.clamp_min(_TINY)
        b.grad[:, kept:] += pruning.penalty * size_a * columns / size_b.clamp_min(_TINY)
