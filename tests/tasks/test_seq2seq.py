from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedpeft import models
from fedpeft.config.adapters import Lora, PromptTuning
from fedpeft.config.tasks import Seq2Seq
from fedpeft.config.training import ModelConfig
from fedpeft.data.fields import Row
from fedpeft.errors import DataError
from fedpeft.evaluation import evaluate, sampled
from fedpeft.models import AdaptedModel
from fedpeft.tasks import IGNORED, Example, build_task
from fedpeft.tasks.seq2seq import collate

pytestmark = pytest.mark.usefixtures("one_thread")
SETTINGS = Seq2Seq(max_tokens=8, max_target_tokens=4)
CPU = torch.device("cpu")
families = pytest.mark.parametrize("family", [Lora(rank=3), PromptTuning(virtual_tokens=4)])


def load(source: Path, family: Any) -> AdaptedModel:
    return models.load(ModelConfig(source=str(source), device="cpu"), family.build(), SETTINGS.head, 0)


def aimed(text: str, target: str) -> Row:
    return Row(text, "", "films", {"target": target})


def test_texts_are_cut_and_targets_are_not(tiny_t5: Path) -> None:
    tokenizer = load(tiny_t5, Lora(rank=3)).tokenizer
    (found,) = build_task(SETTINGS).encode([aimed("so " * 20, "the yes")], tokenizer, "here")
    assert tokenizer.convert_ids_to_tokens(list(found.tokens)) == [*["so"] * 7, "</s>"]
    assert tokenizer.convert_ids_to_tokens(list(found.label)) == ["the", "yes", "</s>"]
    assert (found.group, found.size) == ("films", 8)
    with pytest.raises(DataError, match=r"here, row 1: .* a target of at most 4 tokens, .* found 5; .*max_target"):
        build_task(SETTINGS).encode([aimed("so", "the the the yes")], tokenizer, "here")
    with pytest.raises(DataError, match="here, row 2: expected a text and a target, found no target"):
        build_task(SETTINGS).encode([aimed("so", "yes"), Row("so", "yes")], tokenizer, "here")


def test_a_batch_is_padded_to_its_longest_text_and_target() -> None:
    batch = collate([Example((5, 3), (7, 8, 3), ""), Example((5, 6, 3), (3,), "")], 1, CPU)
    assert batch["input_ids"].tolist() == [[5, 3, 1], [5, 6, 3]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert batch["labels"].tolist() == [[7, 8, 3], [3, IGNORED, IGNORED]]
    assert batch["decoder_attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]


def some() -> tuple[Example, ...]:
    random = np.random.default_rng(0)
    sizes = random.integers(1, 6, (7, 2)).tolist()
    return tuple(
        Example((*random.integers(4, 20, n).tolist(), 3), (*random.integers(4, 20, m).tolist(), 3), "")
        for n, m in sizes
    )


@families
def test_figures_are_the_models_own(tiny_t5: Path, family: Any) -> None:
    adapted, task = load(tiny_t5, family), build_task(SETTINGS)
    losses, tokens = [], []
    adapted.model.eval()
    with torch.no_grad():
        for example in some():
            ids, labels = torch.tensor([example.tokens]), torch.tensor([example.label])
            own = adapted.model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss
            losses.append(float(own))
            tokens.append(labels.shape[1])
    found = evaluate(adapted, task, some(), 3)
    assert found["loss"] == pytest.approx(np.average(losses, weights=tokens), rel=1e-5)
    assert found["rows"] == 7
    assert "exact_match" not in found


@families
def test_exact_match_counts_greedy_answers_that_are_the_target(tiny_t5: Path, family: Any) -> None:
    adapted = load(tiny_t5, family)
    examples = some()
    spoken = [one.answered for one in sampled(adapted, build_task(SETTINGS), examples)]
    tokens = [tuple(adapted.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in spoken]
    # The first three are to answer what they do answer (as far as it goes), the others something else.
    aims = [one if at < 3 else (4, *one) for at, one in enumerate(tokens)]
    told = tuple(Example(e.tokens, aim or (4,), "") for e, aim in zip(examples, aims, strict=True))
    expected = np.mean([at < 3 and bool(tokens[at]) for at in range(len(told))])
    found = evaluate(adapted, build_task(Seq2Seq(exact_match=True)), told, 3)
    assert found["exact_match"] == pytest.approx(expected)
    assert expected > 0
