from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from fedpeft import models
from fedpeft.config.adapters import ADAPTERS
from fedpeft.example_gradients import WAYS, clipped_sum
from fedpeft.models import AdaptedModel
from fedpeft.privacy.entropy import from_seed, from_system
from fedpeft.privacy.examples import ExamplePrivacy
from fedpeft.private_steps import PrivateSteps
from tests import tiny, tiny_tasks

pytestmark = pytest.mark.usefixtures("one_thread")
TEXTS = tuple(tiny_tasks.Toy(at, tuple(range(5, 8 + at)), at % 3) for at in range(5))


def steps(adapted: AdaptedModel, noise: float = 0.0, clip: float = 0.5) -> PrivateSteps:
    parameters = models.trained(adapted)
    privacy = ExamplePrivacy(clip_norm=clip, noise_multiplier=noise)
    way = next(iter(WAYS.values()))
    return PrivateSteps(adapted, tiny_tasks.task("bert"), parameters, privacy, way, from_system(0), 2, 4.0)


def written(one: PrivateSteps) -> torch.Tensor:
    found = [parameter.grad for parameter in one.parameters.values() if parameter.grad is not None]
    assert len(found) == len(one.parameters)
    return torch.cat([gradient.flatten().double() for gradient in found])


@pytest.fixture
def adapted(tiny_model: Path) -> AdaptedModel:
    made = tiny.load(tiny_model)
    models.install(made, tiny.moved(made.initial))
    return made


def test_without_noise_a_step_is_the_clipped_sum_over_the_expected_number(adapted: AdaptedModel) -> None:
    one = steps(adapted)
    sums, longer = clipped_sum(one.way(adapted, one.task, list(one.parameters.values()), TEXTS), 0.5)
    assert longer > 0
    seen = one.take(TEXTS)
    torch.testing.assert_close(written(one), torch.cat([total.flatten() for total in sums]) / 4.0, rtol=1e-4, atol=1e-7)
    assert sum(len(losses) for losses in seen.losses) == len(TEXTS)
    assert seen.clipped == longer
    assert {parameter.grad.dtype for parameter in one.parameters.values() if parameter.grad is not None} == {
        torch.float32
    }


@pytest.mark.parametrize("texts", [(), TEXTS[:3]], ids=["of no examples", "of three"])
def test_the_noise_has_the_standard_deviation_that_is_accounted(
    adapted: AdaptedModel, texts: tuple[object, ...]
) -> None:
    """Its sum of squares over z² C² / B² is a chi-square; also of a step that drew nothing, which is noise alone."""
    noise, clip = 1.7, 0.5
    quiet = steps(adapted)
    quiet.take(texts)  # type: ignore[arg-type]
    expected, loud = written(quiet), steps(adapted, noise, clip)
    draws = []
    for _ in range(30):
        loud.take(texts)  # type: ignore[arg-type]
        draws.append((written(loud) - expected).numpy() / (noise * clip / 4.0))
    found = np.concatenate(draws)
    low, high = stats.chi2.ppf([1e-5, 1 - 1e-5], found.size)
    assert low < float((found**2).sum()) < high
    assert abs(found.mean()) < 5 / math.sqrt(found.size)
    assert stats.kstest(found, "norm").pvalue > 1e-5
    assert np.abs(np.corrcoef(draws[0], draws[1])[0, 1]) < 5 / math.sqrt(draws[0].size)
    if not texts:
        assert float(expected.abs().max()) == 0


def test_noise_from_the_system_is_never_the_same_and_no_seed_of_torch_moves_it(adapted: AdaptedModel) -> None:
    one, found = steps(adapted, 1.0), []
    for _ in range(2):
        torch.manual_seed(0)
        one.take(())
        found.append(written(one))
    assert not torch.isclose(found[0], found[1], atol=1e-9).any()


def test_noise_from_a_seed_repeats(adapted: AdaptedModel) -> None:
    found = []
    for seed in (1, 1, 2):
        one = replace(steps(adapted, 1.0), noise=from_seed(seed, "noise"))
        one.take(())
        found.append(written(one))
    assert torch.equal(found[0], found[1])
    assert not torch.isclose(found[0], found[2]).any()


def test_what_a_family_adds_to_every_loss_is_neither_clipped_nor_counted_for_examples(tiny_model: Path) -> None:
    adapted = tiny.load(tiny_model, ADAPTERS.members["adalora"](rank=3, alpha=5.0))
    models.install(adapted, tiny.moved(adapted.initial))
    assert adapted.penalty is not None
    parameters = models.trained(adapted)
    penalised, plain = steps(adapted, clip=1e-4), steps(replace(adapted, penalty=None), clip=1e-4)
    wanted = torch.autograd.grad(adapted.penalty(), list(parameters.values()), allow_unused=True)
    pairs = zip(wanted, parameters.values(), strict=True)
    own = torch.cat([(torch.zeros_like(one) if gradient is None else gradient).flatten() for gradient, one in pairs])
    penalised.take(TEXTS)
    found = written(penalised)
    plain.take(TEXTS)
    torch.testing.assert_close(found - written(plain), own.double(), atol=1e-6, rtol=1e-4)
    assert float(own.norm()) > 100 * 1e-4
