"""Canaries are ranked among all endings, and one that was heard often stands before one that never was."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedpeft.config import RunConfig
from fedpeft.data.rows import Row
from fedpeft.errors import PlanError
from simulations.privacy.canaries import (
    ENDINGS,
    Canaries,
    Canary,
    answer_likelihoods,
    canaries,
    exposure,
    judged,
    rank,
)
from simulations.privacy.recording import public_of
from tests import tiny

LETTERS = Canaries(repeated=(2, 24), each=2, alphabet=tiny.WORDS[:10], separator=" ")


def test_the_exposure_of_what_comes_first_is_all_bits_and_of_chance_about_one_and_a_half() -> None:
    likelihoods = np.linspace(0, 1, 10_000)
    assert rank(likelihoods, 9_999) == 1
    assert exposure(np.array([1]))[0] == pytest.approx(math.log2(10_000))
    assert exposure(np.array([10_000]))[0] == 0.0
    assert exposure(np.arange(1, 10_001)).mean() == pytest.approx(1 / math.log(2), abs=0.01)


def test_equals_stand_before_and_other_canaries_are_passed_over() -> None:
    likelihoods = np.array([3.0, 2.0, 2.0, 1.0])
    assert rank(likelihoods, 1) == 3
    assert rank(likelihoods, 1, others=[0, 1]) == 2


def test_there_are_ten_thousand_endings_in_order() -> None:
    assert len(ENDINGS) == 10_000
    assert ENDINGS[4719] == (4, 7, 1, 9)


@pytest.fixture(scope="module")
def writing(tiny_llama: Path, tiny_answers: Path) -> RunConfig:
    return tiny.run_config(
        tiny_llama,
        tiny_answers,
        Path("nowhere"),
        rounds=6,
        task={"kind": "causal_lm", "causal_lm": {"max_tokens": 48, "template": "{text} "}},
        adapter={"family": "lora", "lora": {"rank": 8, "alpha": 16.0}},
        data={"partition": {"most_rows": 4}},
        federation={"clients": 2, "cohort": 2},
        training={"steps": 30, "batch_size": 8, "learning_rate": 0.02},
        evaluation={"every": 0, "samples": 0},
    )


def test_the_likelihood_of_an_ending_is_that_of_the_whole_text(writing: RunConfig) -> None:
    public, one = public_of(writing), canaries(LETTERS, writing)[3]
    adapter = tiny.moved(public.adapted.initial)
    found = answer_likelihoods(adapter, public, LETTERS, one)
    assert found.shape == (10_000,)
    assert np.exp(found).sum() < 1
    tokenizer = public.adapted.tokenizer
    letters = [tokenizer(letter, add_special_tokens=False)["input_ids"][0] for letter in LETTERS.alphabet]
    (example,) = public.task.encode([one.row], tokenizer, "canary")
    for ending in (0, 1, 1234, 4719, 9999, one.ending):
        text = [*example.tokens[: example.prompt], *(letters[letter] for letter in ENDINGS[ending])]
        with torch.no_grad():
            logs = torch.log_softmax(public.adapted.model(input_ids=torch.tensor([text])).logits[0].double(), -1)
        whole = sum(float(logs[at - 1, text[at]]) for at in range(example.prompt, len(text)))
        assert found[ending] == pytest.approx(whole, abs=1e-4)


def test_canaries_are_unlike_and_at_every_level(writing: RunConfig) -> None:
    made = canaries(LETTERS, writing)
    assert sorted(one.repeated for one in made) == [0, 0, 2, 2, 24, 24]
    assert len({one.ending for one in made}) == len(made)
    assert {one.partition for one in made} == {0, 1}


def test_a_sentence_that_was_written_often_is_more_exposed_than_one_never_seen(writing: RunConfig) -> None:
    found = {one.metric: one for one in LETTERS.run(writing)}
    assert set(found) == {
        "exposure in bits, never seen",
        "exposure in bits, repeated 2 times",
        "exposure in bits, repeated 24 times",
    }
    often, never = found["exposure in bits, repeated 24 times"], found["exposure in bits, never seen"]
    assert often.value > never.value + 2
    assert 0 <= never.low <= often.high <= math.log2(10_000)
    assert often.n == 2


def test_a_label_that_was_given_often_can_be_told(tiny_config: Callable[..., RunConfig]) -> None:
    config = tiny_config(
        rounds=4,
        adapter={"family": "lora", "lora": {"rank": 8, "alpha": 16.0}},
        data={"partition": {"most_rows": 4}},
        training={"steps": 40, "batch_size": 8, "learning_rate": 0.02},
        evaluation={"every": 0},
    )
    made = canaries(LETTERS, config)
    assert {one.row.label for one in made} <= set(tiny.LABELS)
    found = {one.metric: one.value for one in LETTERS.run(config)}
    assert found["exposure in bits, repeated 24 times"] > 1
    assert all(0 <= value <= math.log2(10_000) for value in found.values())


def test_letters_that_are_not_tokens_are_refused_before_anything_is_trained(writing: RunConfig) -> None:
    with pytest.raises(PlanError, match="letters that are one token each, wherever they stand"):
        Canaries().run(writing)


def test_a_task_that_neither_writes_nor_labels_texts_is_refused(tiny_model: Path, tiny_tags: Path) -> None:
    task: dict[str, Any] = {"kind": "token_classification", "token_classification": {"max_tokens": 24}}
    config = tiny.run_config(tiny_model, tiny_tags, Path("nowhere"), task=task)
    with pytest.raises(PlanError, match="a task that writes answers or gives texts labels, found token_classification"):
        LETTERS.run(config)


def test_exposures_are_told_level_by_level() -> None:
    made = [Canary(Row("a"), at, 0, repeated) for at, repeated in enumerate((0, 4, 4))]
    found = judged(made, np.array([10_000, 1, 2]))
    assert [(one.metric, one.n) for one in found] == [
        ("exposure in bits, never seen", 1),
        ("exposure in bits, repeated 4 times", 2),
    ]
    assert found[1].value == pytest.approx(math.log2(10_000) - 0.5)
