import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from fedpeft import models
from fedpeft.bases import load_tokenizer
from fedpeft.config import RunConfig
from fedpeft.config.adapters import Ia3, Lora, PromptTuning
from fedpeft.config.adapters.bottlenecks import Houlsby
from fedpeft.config.adapters.scales import BitFit
from fedpeft.config.tasks import Preference
from fedpeft.config.training import ModelConfig
from fedpeft.data.fields import Row
from fedpeft.errors import ConfigError, DataError
from fedpeft.evaluation import evaluate, evaluate_base, sampled
from fedpeft.experiment import adapted_model, evaluator_of
from fedpeft.federate import federate
from fedpeft.models import AdaptedModel
from fedpeft.runs import folder_for
from fedpeft.tasks import IGNORED, Task, build_task
from fedpeft.tasks.preference import Pair, collate
from fedpeft.tasks.prompts import Prompted
from tests import tiny, tiny_models

pytestmark = pytest.mark.usefixtures("one_thread")
SETTINGS = Preference(max_tokens=16, beta=0.3)
CPU = torch.device("cpu")
FAMILIES = {
    "lora": Lora(rank=3, alpha=5.0),
    "ia3": Ia3(),
    "bitfit": BitFit(),
    "houlsby": Houlsby(),
    "prompt_tuning": PromptTuning(virtual_tokens=4),
}
every_family = pytest.mark.parametrize("family", sorted(FAMILIES))


def preferred(text: str, chosen: str, rejected: str, group: str = "") -> Row:
    return Row(text, group=group, fields={"chosen": chosen, "rejected": rejected})


ROWS = (
    preferred("good film", "yes", "the bad"),
    preferred("bad so so", "no very", "yes", "shops"),
    preferred("dull", "not good", "great"),
)


@pytest.fixture(scope="module")
def biased_llama(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny tokenizer beside a decoder that has biases to train."""
    folder = tmp_path_factory.mktemp("biased-llama")
    tiny_models.llama(biases=True).save_pretrained(str(folder))
    load_tokenizer(ModelConfig(source=str(tiny_llama))).save_pretrained(str(folder))
    return folder


@pytest.fixture
def load(biased_llama: Path) -> Callable[[str], AdaptedModel]:
    config = ModelConfig(source=str(biased_llama), device="cpu")
    return lambda family: models.load(config, FAMILIES[family].build(), SETTINGS.head, 0)


def batch_of(adapted: AdaptedModel, task: Task, rows: tuple[Row, ...] = ROWS) -> Any:
    return task.collate(task.encode(rows, adapted.tokenizer, "here"), 0, CPU)


def log_likelihoods(model: Any, pairs: tuple[Pair, ...], side: str) -> np.ndarray:
    """By hand in float64, one text after another: the sum of the log probabilities of the answer's tokens."""
    found = []
    for pair in pairs:
        text = getattr(pair, side)
        logits = model(input_ids=torch.tensor([text.tokens])).logits[0][-text.size :].double().detach().numpy()
        logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        found.append(sum(logs[at - 1, text.tokens[at]] for at in range(text.prompt, text.size)))
    return np.array(found)


def dpo(adapted: AdaptedModel, base: Any, pairs: tuple[Pair, ...], settings: Preference) -> tuple[np.ndarray, ...]:
    """Loss and both rewards of each pair, in float64."""
    rewards = [
        settings.beta * (log_likelihoods(adapted.model, pairs, side) - log_likelihoods(base, pairs, side))
        for side in ("chosen", "rejected")
    ]
    sigmoid = 1 / (1 + np.exp(-(rewards[0] - rewards[1])))
    smooth = settings.label_smoothing
    return -(1 - smooth) * np.log(sigmoid) - smooth * np.log(1 - sigmoid), *rewards


@every_family
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_loss_and_gradient_are_those_of_the_paper_by_hand(
    family: str, smoothing: float, load: Callable[[str], AdaptedModel], biased_llama: Path
) -> None:
    settings = replace(SETTINGS, label_smoothing=smoothing)
    adapted, task = load(family), build_task(settings)
    base = tiny_models.llama(biases=True)
    adapted.model.double()
    base.double()
    models.install(adapted, tiny.moved(adapted.initial))
    pairs = task.encode(ROWS, adapted.tokenizer, "here")
    losses, chosen, rejected = dpo(adapted, base, pairs, settings)
    adapted.model.train()
    loss = task.loss(adapted.model, task.collate(pairs, 0, CPU))
    assert float(loss.detach()) == pytest.approx(losses.mean(), rel=1e-5)
    torch.autograd.backward(loss)
    for binding in list(adapted.bindings.values())[:2]:
        parameter, step = binding.parameter, 1e-3
        at = int(parameter.grad.abs().argmax())
        assert abs(parameter.grad.flatten()[at]) > 1e-4
        around = []
        for way in (step, -step):
            parameter.data.view(-1)[at] += way
            around.append(dpo(adapted, base, pairs, settings)[0].mean())
            parameter.data.view(-1)[at] -= way
        assert float(parameter.grad.flatten()[at]) == pytest.approx((around[0] - around[1]) / (2 * step), rel=1e-3)
    found = evaluate(adapted, task, pairs, 2)
    assert found["loss"] == pytest.approx(losses.mean(), rel=1e-5)
    assert found["margin"] == pytest.approx((chosen - rejected).mean(), rel=1e-4)
    assert found["reward_accuracy"] == (chosen > rejected).mean()
    assert found["rows"] == 3


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"prompt_tuning"}))
def test_a_fresh_adapter_is_its_own_reference(family: str, load: Callable[[str], AdaptedModel]) -> None:
    adapted, task = load(family), build_task(SETTINGS)
    pairs = task.encode(ROWS, adapted.tokenizer, "here")
    adapted.model.train()
    batch = task.collate(pairs, 0, CPU)
    assert float(task.loss(adapted.model, batch).detach()) == np.float32(math.log(2))
    found = evaluate(adapted, task, pairs, 2)
    assert (found["loss"], found["margin"], found["reward_accuracy"]) == (np.float32(math.log(2)), 0.0, 0.0)


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"prompt_tuning"}))
def test_the_model_is_left_as_it_was(family: str, load: Callable[[str], AdaptedModel]) -> None:
    adapted, task = load(family), build_task(SETTINGS)
    still = next(iter(adapted.bindings.values())).parameter
    models.install(adapted, tiny.moved(adapted.initial))
    adapted.model.train()
    still.requires_grad_(False)
    before = {name: (p.requires_grad, p.detach().clone()) for name, p in adapted.model.named_parameters()}
    torch.autograd.backward(task.loss(adapted.model, batch_of(adapted, task)))
    for name, parameter in adapted.model.named_parameters():
        assert (parameter.requires_grad, True) == (before[name][0], torch.equal(parameter, before[name][1]))
        assert (parameter.grad is None) or parameter.requires_grad
    assert all(module.training for module in adapted.model.modules())


def test_the_reference_has_no_dropout(biased_llama: Path) -> None:
    config = ModelConfig(source=str(biased_llama), device="cpu", dropout=0.5)
    settings = Lora(rank=3, alpha=5.0, dropout=0.5)
    adapted = models.load(config, settings.build(), SETTINGS.head, 0)
    task = build_task(SETTINGS)
    models.install(adapted, tiny.moved(adapted.initial))
    pairs = task.encode(ROWS, adapted.tokenizer, "here")
    batch = task.collate(pairs, 0, CPU)
    adapted.model.train()
    torch.manual_seed(3)
    found = float(task.loss(adapted.model, batch).detach())
    torch.manual_seed(3)
    logits = adapted.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    logs = logits[:, :-1].detach().double().log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
    spoken = (logs * (batch["labels"][:, 1:] != IGNORED)).sum(1).numpy()
    base = tiny_models.llama(biases=True)
    bare = np.concatenate([log_likelihoods(base, pairs, side) for side in ("chosen", "rejected")])
    chosen, rejected = np.split(0.3 * (spoken - bare), 2)
    assert found == pytest.approx(np.log1p(np.exp(rejected - chosen)).mean(), rel=1e-4)
    assert abs(spoken - bare).max() > 0.5


@pytest.mark.parametrize("family", ["bitfit", "lora"])
def test_lower_precision_mixes_up_nothing(family: str, load: Callable[[str], AdaptedModel]) -> None:
    adapted, task = load(family), build_task(SETTINGS)
    models.install(adapted, tiny.moved(adapted.initial))
    batch, losses, gradients = batch_of(adapted, task), [], []
    for lower in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=lower):
            loss = task.loss(adapted.model, batch)
        torch.autograd.backward(loss)
        losses.append(float(loss.detach()))
        gradients.append(torch.cat([binding.parameter.grad.flatten() for binding in adapted.bindings.values()]))
        adapted.model.zero_grad()
    assert losses[1] == pytest.approx(losses[0], abs=0.02)
    assert functional.cosine_similarity(*gradients, dim=0) > 0.98
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        first, again = (task.score(adapted.model, batch) for _ in range(2))
    assert all(np.array_equal(first[key], again[key]) for key in first)


@every_family
def test_of_the_base_alone_nothing_is_preferred(family: str, load: Callable[[str], AdaptedModel]) -> None:
    adapted, task = load(family), build_task(SETTINGS)
    pairs = task.encode(ROWS, adapted.tokenizer, "here")
    found = evaluate_base(adapted, task, pairs, 2)
    assert (found["margin"], found["loss"]) == (0.0, np.float32(math.log(2)))


def test_pairs_share_their_prompt_and_a_batch_is_chosen_then_rejected(tiny_llama: Path) -> None:
    tokenizer = load_tokenizer(ModelConfig(source=str(tiny_llama)))
    task = build_task(replace(SETTINGS, max_tokens=8))
    long = preferred("bad " * 9 + "good film", "very so", "so so very no", "shops")
    (pair,) = task.encode([long], tokenizer, "here")
    told = [tokenizer.convert_ids_to_tokens(list(text.tokens)) for text in (pair.chosen, pair.rejected)]
    assert told == [
        ["<s>", "good", "film", "very", "so", "</s>"],
        ["<s>", "good", "film", "so", "so", "very", "no", "</s>"],
    ]
    assert (pair.chosen.prompt, pair.rejected.prompt, pair.size, pair.group) == (3, 3, 14, "shops")
    other = Pair(Prompted((1, 2), 1, ""), Prompted((1, 3, 4), 1, ""))
    batch = collate([pair, other], 9, CPU)
    assert batch["input_ids"].shape == (4, 8)
    assert batch["input_ids"][[1, 3], :3].tolist() == [[1, 2, 9], [1, 3, 4]]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (Row("good"), "found no chosen answer"),
        (Row("good", fields={"chosen": "yes"}), "found no rejected answer"),
        (preferred("good", "yes", "yes"), "found the same answer twice"),
        (preferred("good", "yes", "so " * 17), r"found 18; .*task\.preference\.max_tokens"),
    ],
)
def test_a_row_that_cannot_be_used_is_one_sentence(row: Row, expected: str, tiny_llama: Path) -> None:
    tokenizer = load_tokenizer(ModelConfig(source=str(tiny_llama)))
    with pytest.raises(DataError, match=f"here, row 2: .*{expected}"):
        build_task(SETTINGS).encode([ROWS[0], row], tokenizer, "here")


@pytest.mark.parametrize("bad", [{"beta": 0.0}, {"label_smoothing": 0.6}, {"template": "so"}, {"max_tokens": 2}])
def test_a_setting_out_of_range_is_named(bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(bad))):
        Preference(**bad)


def test_samples_stand_beside_the_chosen_answers(load: Callable[[str], AdaptedModel]) -> None:
    adapted, task = load("lora"), build_task(replace(SETTINGS, sample_tokens=3))
    found = sampled(adapted, task, task.encode(ROWS, adapted.tokenizer, "here"))
    assert [(one.given, one.expected) for one in found][:2] == [("good film", "yes"), ("bad so so", "no very")]


@pytest.fixture(scope="session")
def tiny_pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of two groups: the chosen answer is told by the text's first word, the rejected one is another."""
    import json

    path = tmp_path_factory.mktemp("tiny-pairs") / "rows.jsonl"
    lines = [json.loads(line) for line in tiny.write_rows(path, 60).read_text().splitlines()]
    for line in lines:
        label = line.pop("label")
        others = [name for name in tiny.LABELS if name != label]
        line |= {"chosen": f"the {label}", "rejected": f"the {others[len(line['text']) % 2]}"}
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def run_config(source: Path, rows: Path, out: Path, **changes: Any) -> RunConfig:
    given = {
        "rounds": 3,
        "task": {"kind": "preference", "preference": {"max_tokens": 16, "beta": 0.5}},
        "training": {"steps": 5, "batch_size": 8, "learning_rate": 0.05},
        "adapter": {"family": "lora", "lora": {"rank": 3, "alpha": 6.0}, "prompt_tuning": {"virtual_tokens": 4}},
    }
    return tiny.run_config(source, rows, out, **{**given, **changes})


@pytest.mark.parametrize(
    ("family", "rule"),
    [("lora", "fedit"), ("lora", "fedex"), ("ia3", ""), ("bitfit", ""), ("houlsby", ""), ("prompt_tuning", "")],
)
def test_a_federation_learns_what_is_preferred(
    family: str, rule: str, tmp_path: Path, biased_llama: Path, tiny_pairs: Path
) -> None:
    changes: dict[str, Any] = {"adapter": {"family": family, "prompt_tuning": {"virtual_tokens": 4}}}
    if family == "prompt_tuning":
        changes |= {"rounds": 5, "training": {"steps": 8, "batch_size": 8, "learning_rate": 0.1}}
    if rule:
        changes["aggregation"] = {"merge": {"rule": rule}}
    config = run_config(biased_llama, tiny_pairs, tmp_path / "run", **changes)
    before = evaluator_of(config)(adapted_model(config).initial)
    folder = folder_for(config)
    records = federate(config, folder, tiny.transport(config, folder), engine="local")
    after = records[-1]["evaluation"]
    assert config.evaluation.metric == "reward_accuracy"
    assert [record["failures"] for record in records if record["event"] == "round"] == [[]] * config.rounds
    assert after["reward_accuracy"] >= max(0.65, before["reward_accuracy"] + 0.2)
    assert after["loss"] < before["loss"]
    assert after["margin"] > max(0.0, before["margin"])
