import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedpeft import models
from fedpeft.bases import load_tokenizer
from fedpeft.config.adapters import Lora, PromptTuning
from fedpeft.config.tasks import CausalLM
from fedpeft.config.training import ModelConfig
from fedpeft.data.fields import Row
from fedpeft.errors import DataError, PlanError
from fedpeft.evaluation import evaluate, sampled
from fedpeft.models import AdaptedModel
from fedpeft.tasks import IGNORED, build_task
from fedpeft.tasks.packing import collate, labels_of, pack
from fedpeft.tasks.prompts import Prompted

pytestmark = pytest.mark.usefixtures("one_thread")
SETTINGS = CausalLM(max_tokens=8)
MESSAGES = CausalLM(form="messages", max_tokens=32)
CPU = torch.device("cpu")


def answered(text: str, answer: str) -> Row:
    return Row(text, fields={"answer": answer})


def said(*turns: str) -> Row:
    """A conversation of user and assistant by turns."""
    pairs = tuple((("user", "assistant")[at % 2], text) for at, text in enumerate(turns))
    return Row(" ".join(turns[:-1]), fields={"messages": pairs})


def load(source: Path, family: Any = None) -> AdaptedModel:
    settings = family or Lora(rank=3, alpha=5.0)
    return models.load(ModelConfig(source=str(source), device="cpu"), settings.build(), SETTINGS.head, 0)


def words(tokenizer: Any, settings: CausalLM, row: Row) -> tuple[list[str], list[str]]:
    """The prompt's tokens and the answer's."""
    (found,) = build_task(settings).encode([row], tokenizer, "here")
    tokens = tokenizer.convert_ids_to_tokens(list(found.tokens))
    return tokens[: found.prompt], tokens[found.prompt :]


@pytest.fixture(scope="module")
def plain(tiny_llama: Path) -> Any:
    return load_tokenizer(ModelConfig(source=str(tiny_llama)))


@pytest.fixture(scope="module")
def chat(tiny_chat: Path) -> Any:
    return load_tokenizer(ModelConfig(source=str(tiny_chat)))


def test_a_plain_prompt_stands_between_the_marks_of_a_text(plain: Any) -> None:
    asked = replace(SETTINGS, template="user : {text} assistant :")
    assert words(plain, asked, answered("good", "yes")) == (
        ["<s>", "user", ":", "good", "assistant", ":"],
        ["yes", "</s>"],
    )
    assert words(plain, MESSAGES, said("good", "yes", "bad", "no"))[0][1:] == (
        ["<unk>", "good", "<unk>", "yes", "<unk>", "bad"]
    )


def test_a_chat_template_is_used_where_there_is_one(chat: Any) -> None:
    wide = replace(SETTINGS, max_tokens=32)
    expected = (["<s>", "user", ":", "good", "</s>", "<s>", "assistant", ":"], ["yes", "</s>"])
    assert words(chat, wide, answered("good", "yes")) == expected
    assert words(chat, MESSAGES, said("good", "yes")) == expected
    longer = words(chat, MESSAGES, said("good", "yes", "bad", "no"))
    assert longer[0][:10] == [*expected[0], *expected[1]]
    assert longer[1] == ["no", "</s>"]
    assert words(chat, replace(wide, chat=False), answered("good", "yes")) == (["<s>", "good"], ["yes", "</s>"])


def test_an_answer_that_the_template_opens_otherwise_ends_as_a_text_does(
    chat: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat, "chat_template", "{{ messages[0].content }}{% if add_generation_prompt %} so{% endif %}")
    assert words(chat, MESSAGES, said("good", "yes")) == (["good", "so"], ["yes", "</s>"])


def test_a_long_prompt_loses_its_beginning_and_the_answer_nothing(plain: Any, chat: Any) -> None:
    row = answered("bad " * 9 + "good film", "very so")
    assert words(plain, SETTINGS, row) == (["<s>", "bad", "bad", "good", "film"], ["very", "so", "</s>"])
    assert words(chat, SETTINGS, row) == (["film", "</s>", "<s>", "assistant", ":"], ["very", "so", "</s>"])
    assert words(plain, SETTINGS, answered("good", "so " * 6)) == (["<s>"], [*["so"] * 6, "</s>"])


@pytest.mark.parametrize(
    ("settings", "row", "expected"),
    [
        (SETTINGS, answered("good", "so " * 7), "row 2: expected an answer of at most 7 tokens, .* found 8"),
        (SETTINGS, Row("good"), "row 2: expected a text and an answer, found no answer; .*form"),
        (MESSAGES, Row("good"), "row 2: expected messages, two or more, .* found 0 messages"),
        (MESSAGES, said("good", "so", "bad"), "row 2: .* the last of the assistant, found the last of the user"),
    ],
)  # fmt: skip
def test_a_row_that_cannot_be_used_is_one_sentence(settings: CausalLM, row: Row, expected: str, plain: Any) -> None:
    task = build_task(settings)
    good = answered("good", "yes") if settings is SETTINGS else said("good", "yes")
    with pytest.raises(DataError, match=f"here, {expected}"):
        task.encode([good, row], plain, "here")


def test_a_conversation_that_the_template_refuses_is_one_sentence(chat: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "chat_template", "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(DataError, match=r"here, row 1: .* found roles must alternate; .*chat=false"):
        build_task(MESSAGES).encode([said("good", "yes")], chat, "here")


def test_only_the_answer_is_learned_unless_all_is() -> None:
    example = Prompted((2, 5, 6, 3), 2, "")
    assert labels_of(example, answer_only=True) == (IGNORED, IGNORED, 6, 3)
    assert labels_of(example, answer_only=False) == (IGNORED, 5, 6, 3)
    assert labels_of(Prompted((6, 3), 0, ""), answer_only=True) == (IGNORED, 3)


def test_padding_is_masked_by_length_where_it_is_the_token_that_ends_texts(plain: Any) -> None:
    assert plain.pad_token_id == plain.eos_token_id == 3
    batch = collate([Prompted((2, 5, 3, 6, 3), 3, ""), Prompted((2, 3), 1, "")], 3, CPU, answer_only=True)
    assert batch["input_ids"].tolist()[1] == [2, 3, 3, 3, 3]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]
    assert batch["labels"].tolist()[1] == [IGNORED, 3, *[IGNORED] * 3]


def some(count: int = 9) -> tuple[Prompted, ...]:
    """Examples of unlike lengths, each with a prompt of a token or more and an answer."""
    random = np.random.default_rng(0)
    sizes = [(int(random.integers(1, 6)), int(random.integers(1, 5))) for _ in range(count)]
    return tuple(Prompted(tuple(random.integers(4, 20, p + a).tolist()), p, "ab"[p % 2]) for p, a in sizes)


def test_figures_are_the_models_own_by_hand(tiny_llama: Path) -> None:
    adapted, task = load(tiny_llama), build_task(SETTINGS)
    examples = some()
    losses, hits = [], []
    adapted.model.eval()
    with torch.no_grad():
        for example in examples:
            logits = adapted.model(input_ids=torch.tensor([example.tokens])).logits[0].log_softmax(-1)
            for at in range(example.prompt, example.size):
                losses.append(-float(logits[at - 1, example.tokens[at]]))
                hits.append(int(logits[at - 1].argmax()) == example.tokens[at])
    found = evaluate(adapted, task, examples, 4)
    assert found["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(np.mean(losses)), rel=1e-5)
    assert found["token_accuracy"] == pytest.approx(np.mean(hits))
    assert found["rows"] == 9
    assert set(found["groups"]) == {"a", "b"}
    batch = task.collate(examples, 0, CPU)
    assert float(task.loss(adapted.model, batch).detach()) == pytest.approx(np.mean(losses), rel=1e-5)


def test_virtual_tokens_stand_before_what_is_scored(tiny_llama: Path) -> None:
    adapted, task = load(tiny_llama, PromptTuning(virtual_tokens=4)), build_task(SETTINGS)
    example = some()[0]
    prompt = adapted.initial.tensors[next(iter(adapted.initial.tensors))]
    model: Any = adapted.model
    adapted.model.eval()
    with torch.no_grad():
        inner = model.get_base_model()
        embedded = inner.get_input_embeddings()(torch.tensor([example.tokens]))
        whole = torch.cat([torch.from_numpy(prompt)[None], embedded], 1)
        logits = inner(inputs_embeds=whole).logits[0, 4:].log_softmax(-1)
    expected = [-float(logits[at - 1, example.tokens[at]]) for at in range(example.prompt, example.size)]
    assert evaluate(adapted, task, [example], 4)["loss"] == pytest.approx(np.mean(expected), rel=1e-5)


def test_packed_texts_fill_rows_and_are_told_apart() -> None:
    examples = [Prompted((2, 5, 3), 1, ""), Prompted((2, 6, 7, 8, 3), 2, ""), Prompted((2, 3), 1, "")]
    batch = pack(examples, 9, CPU, answer_only=True)
    assert batch["input_ids"].tolist() == [[2, 6, 7, 8, 3], [2, 5, 3, 2, 3]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4], [0, 1, 2, 0, 1]]
    assert batch["labels"].tolist() == [[IGNORED, IGNORED, 7, 8, 3], [IGNORED, 5, 3, IGNORED, 3]]
    assert batch["row"].tolist() == [[1] * 5, [0, 0, 0, 2, 2]]
    assert "attention_mask" not in batch


@pytest.mark.parametrize("answer_only", [True, False])
def test_packing_changes_no_loss_and_no_gradient(tiny_llama: Path, answer_only: bool) -> None:
    adapted, examples = load(tiny_llama), some(12)
    apart, packed = (
        build_task(replace(SETTINGS, packing=packing, answer_only=answer_only)) for packing in (False, True)
    )
    assert len(packed.collate(examples, 0, CPU)["input_ids"]) < 12
    models.install(adapted, replace(adapted.initial, tensors={k: v + 0.2 for k, v in adapted.initial.tensors.items()}))
    found = []
    for task in (apart, packed):
        adapted.model.train()
        loss = task.loss(adapted.model, task.collate(examples, 0, CPU))
        torch.autograd.backward(loss)
        gradients = {key: binding.parameter.grad.clone() for key, binding in adapted.bindings.items()}
        adapted.model.zero_grad()
        adapted.model.eval()
        with torch.inference_mode():
            found.append((float(loss.detach()), gradients, task.score(adapted.model, task.collate(examples, 0, CPU))))
    (loss, gradients, scores), (loss_packed, gradients_packed, scores_packed) = found
    assert loss_packed == pytest.approx(loss, rel=1e-5)
    for key, value in gradients.items():
        torch.testing.assert_close(gradients_packed[key], value, rtol=1e-3, atol=1e-5)
    for key, values in scores.items():
        np.testing.assert_allclose(scores_packed[key], values, rtol=1e-4, atol=1e-5)


def test_packing_is_refused_where_texts_would_see_each_other(tiny_llama: Path) -> None:
    task = build_task(replace(SETTINGS, packing=True))
    assert task.admit is not None
    task.admit(load(tiny_llama).model)
    with pytest.raises(PlanError, match=r"task\.causal_lm\.packing: .* set task\.causal_lm\.packing=false"):
        task.admit(load(tiny_llama, PromptTuning(virtual_tokens=4)).model)
    assert build_task(SETTINGS).admit is None


@pytest.mark.parametrize("family", [None, PromptTuning(virtual_tokens=4)])
def test_samples_are_greedy_answers(tiny_llama: Path, family: Any) -> None:
    adapted = load(tiny_llama, family)
    task = build_task(replace(SETTINGS, sample_tokens=3))
    examples = task.encode([answered("good film", "yes"), answered("bad", "no")], adapted.tokenizer, "here")
    found = sampled(adapted, task, examples)
    assert [(one.given, one.expected) for one in found] == [("good film", "yes"), ("bad", "no")]
    prompt, spoken = list(examples[0].tokens[: examples[0].prompt]), []
    for _ in range(3):
        with torch.no_grad():
            ids = torch.tensor([prompt + spoken])
            logits = adapted.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        spoken.append(int(logits[0, -1].argmax()))
        if spoken[-1] == adapted.tokenizer.eos_token_id:
            break
    assert found[0].answered == adapted.tokenizer.decode(spoken, skip_special_tokens=True).strip()
