"""The gradients of training steps that protect each example: clipped one by one, added up, and noise on the sum.

Source: Abadi et al. 2016, "Deep Learning with Differential Privacy", algorithm 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from fedpeft.example_gradients import Way, clipped_sum
from fedpeft.models import AdaptedModel
from fedpeft.privacy.entropy import Uniforms
from fedpeft.privacy.examples import ExamplePrivacy, released
from fedpeft.tasks import Encoded, Task


@dataclass(frozen=True)
class Stepped:
    """What one step saw, which nothing protects: the losses of its examples, and how many gradients were clipped."""

    losses: tuple[torch.Tensor, ...]
    clipped: int


@dataclass(frozen=True)
class PrivateSteps:
    """All that the steps of one fit have in common.

    At most `at_once` examples are computed together; the sum is divided by `expected` examples, whatever a step drew.
    """

    adapted: AdaptedModel
    task: Task
    parameters: Mapping[str, nn.Parameter]
    privacy: ExamplePrivacy
    way: Way
    noise: Uniforms
    at_once: int
    expected: float

    def take(self, examples: Sequence[Encoded]) -> Stepped:
        """Each parameter's `.grad` is (Σ clipped gradients of `examples` + noise) / `expected`.

        With no examples it is noise alone. What the family adds to every loss depends on no example, so it is added
        behind the noise.
        """
        parameters = list(self.parameters.values())
        sums = [torch.zeros_like(one, dtype=torch.float64, requires_grad=False) for one in parameters]
        losses: list[torch.Tensor] = []
        clipped = 0
        for start in range(0, len(examples), self.at_once):
            taken = self.way(self.adapted, self.task, parameters, examples[start : start + self.at_once])
            own, longer = clipped_sum(taken, self.privacy.clip_norm)
            sums = [total + one for total, one in zip(sums, own, strict=True)]
            losses.append(taken.losses)
            clipped += longer
        noisy = released(
            {key: total.cpu().numpy() for key, total in zip(self.parameters, sums, strict=True)},
            self.privacy,
            self.expected,
            self.noise,
        )
        for key, parameter in self.parameters.items():
            parameter.grad = torch.from_numpy(noisy[key]).to(parameter)
        if self.adapted.penalty is not None:
            torch.autograd.backward(self.adapted.penalty())
        return Stepped(tuple(losses), clipped)
