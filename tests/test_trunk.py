"""Training from what frozen layers made of examples gives what training from the examples gives."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fedpeft import models, trunk
from fedpeft.client import Fitted
from fedpeft.cohort import Member, fit_cohort
from fedpeft.cohort_layers import WAYS
from fedpeft.config.adapters import Lora, LoraSb
from fedpeft.config.tasks import CausalLM
from fedpeft.config.training import ModelConfig
from fedpeft.data.rows import Row
from fedpeft.evaluation import evaluate_base
from fedpeft.models import AdaptedModel
from fedpeft.privacy.examples import ExamplePrivacy
from fedpeft.tasks import build_task
from fedpeft.training import TorchLearner
from fedpeft.trunk import cached
from tests import tiny
from tests.test_training import JOB, TASK, bits, learner, some
from tests.tiny import WORDS, moved

pytestmark = pytest.mark.usefixtures("one_thread")
PLENTY = 10**9
UPPER = Lora(rank=2, layers=(1,))


def upper(source: Path, seed: int = 0, **model: object) -> AdaptedModel:
    """A model whose first layer has nothing to learn."""
    return tiny.load(source, UPPER, seed, **model)


def with_cache(plain: TorchLearner, most_bytes: int = PLENTY) -> TorchLearner:
    return replace(plain, task=cached(plain.task, plain.adapted, most_bytes))


@contextmanager
def counted(adapted: AdaptedModel) -> Iterator[Callable[[], int]]:
    """How many examples have gone through the base's first layer inside."""
    layers = max((m for m in adapted.model.modules() if isinstance(m, nn.ModuleList)), key=len)
    rows: list[int] = []
    query = next(module for module in layers[0].modules() if isinstance(module, nn.Linear))
    hook = query.register_forward_hook(lambda module, inputs, output: rows.append(len(output)))
    try:
        yield lambda: sum(rows)
    finally:
        hook.remove()


def close(one: Fitted, other: Fitted) -> None:
    assert one.metrics["loss"] == pytest.approx(other.metrics["loss"], rel=1e-5)
    for key, value in one.after.items():
        np.testing.assert_allclose(value, other.after[key], rtol=1e-3, atol=1e-5, err_msg=key)


def test_training_and_evaluation_agree_with_the_plain_ones_and_read_each_example_once(tiny_model: Path) -> None:
    adapted, examples = upper(tiny_model), some(12)
    plain = learner(adapted, examples, steps=5)
    start = moved(adapted.initial)
    expected, figures = plain.fit(start, JOB), plain.evaluate(start)
    quick = with_cache(plain)
    found = quick.evaluate(start)  # what is read while nothing can be trained serves training, too
    assert found["loss"] == pytest.approx(figures["loss"], rel=1e-6)
    with counted(adapted) as rows:
        close(quick.fit(start, JOB), expected)
        assert quick.evaluate(start) == found
        assert rows() == 0
    assert bits(plain.fit(start, JOB).after.items()) == bits(expected.after.items())


def test_the_bits_do_not_depend_on_what_was_kept_before(tiny_model: Path) -> None:
    after, held = [], []
    for most_bytes in (1, 1000, PLENTY):
        adapted = upper(tiny_model)
        quick = with_cache(learner(adapted, some(12)), most_bytes)
        if most_bytes == PLENTY:
            quick.evaluate(adapted.initial)
        after.append(bits(quick.fit(adapted.initial, JOB).after.items()))
        held.append(trunk._TRUNKS[adapted.model].held_bytes)
    assert after[0] == after[1] == after[2]
    assert held[0] == 0 < held[1] <= 1000 < held[2]


def test_the_base_alone_and_a_factor_that_stands_still_are_served(tiny_model: Path) -> None:
    adapted = upper(tiny_model)
    plain, frozen = learner(adapted), replace(JOB, frozen=tuple(k for k in adapted.spec.shapes if k.endswith(".A")))
    start, task = moved(adapted.initial), cached(TASK, adapted, PLENTY)
    expected = evaluate_base(adapted, TASK, plain.examples, 4)
    assert evaluate_base(adapted, task, plain.examples, 4)["loss"] == pytest.approx(expected["loss"], rel=1e-6)
    close(with_cache(plain).fit(start, frozen), plain.fit(start, frozen))


def test_factors_that_no_gradient_ever_reaches_are_served(tiny_model: Path) -> None:
    adapted = tiny.load(tiny_model, LoraSb(rank=2, layers=(1,)))
    plain, start = learner(adapted), moved(adapted.initial)
    close(with_cache(plain).fit(start, JOB), plain.fit(start, JOB))
    assert trunk._TRUNKS[adapted.model].held_bytes > 0


def test_clients_that_train_together_come_to_the_same(tiny_model: Path) -> None:
    adapted = upper(tiny_model)
    sites = [learner(adapted, some(count, seed=count)) for count in (6, 9)]
    start = moved(adapted.initial)
    expected = [site.fit(start, replace(JOB, partition=at)) for at, site in enumerate(sites)]
    members = [Member(with_cache(site), start, replace(JOB, partition=at)) for at, site in enumerate(sites)]
    for found, alone in zip(fit_cohort(members, 4096, WAYS["for all clients at once"]), expected, strict=True):
        assert isinstance(found, Fitted)
        close(found, alone)


def test_single_examples_are_protected_alike(tiny_model: Path) -> None:
    adapted = upper(tiny_model)
    plain = replace(learner(adapted), private=ExamplePrivacy(1.0, 0.5, "poisson", "seed"))
    close(with_cache(plain).fit(adapted.initial, JOB), plain.fit(adapted.initial, JOB))


def test_a_model_that_writes_is_served(tmp_path: Path) -> None:
    settings = CausalLM(max_tokens=16)
    source = ModelConfig(source=str(tiny.build_llama(tmp_path / "llama")), device="cpu")
    adapted = models.load(source, UPPER.build(), settings.head, 0)
    task, rows = (
        build_task(settings),
        [Row(" ".join(WORDS[at : at + 2 + at % 4]), fields={"answer": "very good"}) for at in range(8)],
    )
    plain = replace(learner(adapted), task=task, examples=task.encode(rows, adapted.tokenizer, "rows"))
    start, quick = moved(adapted.initial), with_cache(plain)
    close(quick.fit(start, JOB), plain.fit(start, JOB))
    assert trunk._TRUNKS[adapted.model].held_bytes > 0
    assert quick.evaluate(start)["loss"] == pytest.approx(plain.evaluate(start)["loss"], rel=1e-5)


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "fedpeft.trunk"]


@pytest.mark.parametrize(
    ("family", "dropout", "why"),
    [("lora", 0.0, "every layer has one to learn"), ("prompt_tuning", 0.0, "every layer"), (UPPER, 0.3, "at random")],
)
def test_what_cannot_be_kept_is_said_once_and_trained_as_ever(
    tiny_model: Path, family: object, dropout: float, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    adapted = tiny.load(tiny_model, family, dropout=dropout)
    plain = learner(adapted)
    expected = plain.fit(adapted.initial, JOB)
    with caplog.at_level(logging.INFO, "fedpeft.trunk"):
        found = with_cache(plain).fit(adapted.initial, JOB)
        with_cache(plain).evaluate(adapted.initial)
    (line,) = said(caplog)
    assert line.startswith("activations of frozen layers are not kept")
    assert why in line
    assert bits(found.after.items()) == bits(expected.after.items())


def test_a_base_whose_layers_tell_each_other_more_than_is_kept_is_trained_as_ever(
    tiny_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    adapted = upper(tiny_model)
    layers = max((m for m in adapted.model.modules() if isinstance(m, nn.ModuleList)), key=len)
    query = next(module for module in layers[0].modules() if isinstance(module, nn.Linear))
    heard: list[torch.Tensor] = []
    query.register_forward_hook(lambda module, inputs, output: heard.append(output.abs().sum()))
    layers[1].register_forward_hook(lambda module, inputs, output: output + (heard.pop() if heard else 0.0))
    with caplog.at_level(logging.INFO, "fedpeft.trunk"):
        with_cache(learner(adapted)).evaluate(adapted.initial)
    assert "computes something else without them" in said(caplog)[0]
