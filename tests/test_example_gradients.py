from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedpeft import models
from fedpeft.adapters import fixed
from fedpeft.config.adapters import Lora, PromptTuning
from fedpeft.config.tasks import CausalLM, Head, Preference, Seq2Seq, TokenClassification
from fedpeft.config.training import ModelConfig
from fedpeft.errors import PlanError
from fedpeft.example_gradients import WAYS, Taken, Way, clipped_sum, one_at_a_time
from fedpeft.gradient_checks import sought, unlike
from fedpeft.models import AdaptedModel
from fedpeft.tasks import Encoded, Example, Task, build_task
from fedpeft.tasks.preference import Pair
from fedpeft.tasks.prompts import Prompted
from tests import tiny, tiny_tasks
from tests.methods.cells import WORKING, Cell, made
from tests.methods.test_contract import pytestmark as pytestmark

AT_ONCE, ROW_BY_ROW, ALONE = WAYS

KINDS: Mapping[str, tuple[str, ...]] = {
    "lora": ("llama", "bert", "vit", "t5"),
    "prompt_tuning": ("llama", "bert", "t5"),
    "llama_adapter": ("llama",),
    "trainable_tokens": ("llama", "t5"),
    "visual_prompt": ("vit",),
}
"""Where a method is tried that is not tried on BERT alone."""

CELLS = tuple(cell for cell in WORKING if cell.kind in KINDS.get(cell.method, ("bert",)))

SLOWER = {
    **dict.fromkeys(("loha", "lokr", "lokr (low-rank W2)", "randlora", "frod", "fourierft", "waveft"), ROW_BY_ROW),
    **dict.fromkeys(("c3a", "shira", "oft"), ROW_BY_ROW),
    **dict.fromkeys(("tinylora", "fish_mask", "child_tuning", "llama_adapter"), ALONE),
}
"""The methods whose gradients are not taken for all rows at once."""

LENGTHS = (5, 2, 6, 3, 4)


def moved(adapted: AdaptedModel, by: float = 0.1) -> dict[str, nn.Parameter]:
    """What is trained, a little off from where it begins."""
    parameters = models.trained(adapted, fixed(adapted.spec))
    random = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for one in parameters.values():
            one.add_(by * torch.randn(one.shape, generator=random))
    return parameters


def alone(adapted: AdaptedModel, task: Task, parameters: Sequence[nn.Parameter], example: Any) -> torch.Tensor:
    """One example's gradient by hand, all tensors in a row, float64."""
    loss = task.loss(adapted.model, task.collate([example], 0, adapted.device))
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    pairs = zip(found, parameters, strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten().double() for g, p in pairs])


def flat(sums: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat([one.flatten() for one in sums])


def by_hand(gradients: Sequence[torch.Tensor], clip: float) -> torch.Tensor:
    return torch.stack([one * min(1.0, clip / max(float(one.norm()), 1e-300)) for one in gradients]).sum(0)


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_clipped_gradients_add_up_to_those_of_a_loop_over_examples(cell: Cell) -> None:
    adapted, task = made(cell, 1), tiny_tasks.task(cell.kind)
    parameters = list(moved(adapted).values())
    before = [one.detach().clone() for one in parameters]
    name = sought(adapted, task, parameters, tiny_tasks.examples(cell.kind))
    expected = ALONE if cell == Cell("trainable_tokens", "t5") else SLOWER.get(cell.method, AT_ONCE)
    assert name == expected
    assert all(torch.equal(one, value) for one, value in zip(parameters, before, strict=True))

    examples = tiny_tasks.examples(cell.kind, LENGTHS, seed=3)
    adapted.model.train()
    gradients = [alone(adapted, task, parameters, one) for one in examples]
    norms = sorted(float(one.norm()) for one in gradients)
    assert norms[0] > 0
    for clip in (norms[0] / 2, norms[2], norms[-1] * 2):
        sums, longer = clipped_sum(WAYS[name](adapted, task, parameters, examples), clip)
        wanted = by_hand(gradients, clip)
        assert float((flat(sums) - wanted).norm() / wanted.norm()) < 2e-5
        assert abs(longer - sum(norm > clip for norm in norms)) <= (1 if clip == norms[2] else 0)
    plain = torch.autograd.grad(task.loss(adapted.model, task.collate(examples, 0, adapted.device)), parameters[0])
    assert torch.isfinite(plain[0]).all(), "the layers compute on their own again"


def taken(seed: int, count: int = 6, shapes: Sequence[tuple[int, ...]] = ((3, 4), (5,), ())) -> Taken:
    """Random gradients of sizes from nothing to beyond float32's square root, some of them not finite."""
    random = torch.Generator().manual_seed(seed)
    sizes = 10.0 ** torch.randint(-8, 31, (count,), generator=random)
    drawn = [torch.randn((count, *shape), generator=random) for shape in shapes]
    for one in drawn:
        one *= sizes.view(-1, *[1] * (one.dim() - 1))
    if seed % 3 == 0:
        drawn[0][seed % count] = (math.nan, math.inf, -math.inf)[seed % 9 // 3]
    return Taken(tuple(drawn), torch.zeros(count))


@pytest.mark.parametrize("clip", [1e-3, 1.0, 50.0])
def test_one_example_more_or_less_moves_the_sum_by_the_clip_at_most(clip: float) -> None:
    worst = 0.0
    for seed in range(60):
        whole = taken(seed)
        sums, _ = clipped_sum(whole, clip)
        for left_out in range(6):
            kept = [at for at in range(6) if at != left_out]
            fewer = Taken(tuple(one[kept] for one in whole.gradients), whole.losses[kept])
            worst = max(worst, float((flat(sums) - flat(clipped_sum(fewer, clip)[0])).norm()))
    assert 0.999 * clip < worst <= clip * (1 + 1e-5)


def test_an_example_of_huge_loss_moves_a_models_sum_by_the_clip_at_most(tiny_model: Path) -> None:
    adapted = tiny.load(tiny_model)
    parameters = list(moved(adapted, by=30.0).values())
    task, clip = tiny_tasks.task("bert"), 0.5
    examples = tiny_tasks.examples("bert", (9, 3, 12, 5))
    examples = tuple(replace(one, words=tuple(word % 19 for word in one.words)) for one in examples)
    way = WAYS[AT_ONCE]
    sums, longer = clipped_sum(way(adapted, task, parameters, examples), clip)
    assert longer == 4
    for at in range(4):
        fewer, _ = clipped_sum(way(adapted, task, parameters, [*examples[:at], *examples[at + 1 :]]), clip)
        assert float((flat(sums) - flat(fewer)).norm()) <= clip * (1 + 1e-5)


def test_a_gradient_that_is_not_finite_counts_as_nothing() -> None:
    gradients = (torch.tensor([[3.0, 4.0], [math.nan, 1.0], [math.inf, 0.0], [0.0, -1e30]]),)
    sums, longer = clipped_sum(Taken(gradients, torch.zeros(4)), 1.0)
    torch.testing.assert_close(sums[0], torch.tensor([0.6, -0.2], dtype=torch.float64))
    assert longer == 4


def test_what_an_example_is_padded_with_does_not_reach_its_gradient(tiny_model: Path) -> None:
    for family in ("lora", "prompt_tuning"):
        adapted = tiny.load(tiny_model, family)
        parameters = list(moved(adapted).values())
        task = tiny_tasks.task("bert")
        short = tiny_tasks.Toy(0, (5, 6, 7), 1)
        longer = [tiny_tasks.Toy(0, tuple(range(5, 5 + length)), 2) for length in (3, 8, 14)]
        found = [WAYS[AT_ONCE](adapted, task, parameters, [short, other]) for other in longer]
        first, *others = (torch.cat([one[0].flatten() for one in each.gradients]) for each in found)
        assert all(float((one - first).norm() / first.norm()) < 1e-5 for one in others)


def rolled(right: Taken) -> Taken:
    return right._replace(gradients=tuple(one.roll(1, 0) for one in right.gradients))


def as_one(right: Taken) -> Taken:
    """What a hook gives that takes the batch for one example."""
    return right._replace(gradients=tuple(one.mean(0, keepdim=True).expand_as(one) for one in right.gradients))


def without_a_tensor(right: Taken) -> Taken:
    last = torch.zeros_like(right.gradients[-1])
    return right._replace(gradients=(*right.gradients[:-1], last))


def a_little_long(right: Taken) -> Taken:
    return right._replace(gradients=(1.01 * right.gradients[0], *right.gradients[1:]))


def for_fewer(right: Taken) -> Taken:
    return right._replace(gradients=tuple(one[:1] for one in right.gradients))


def not_a_number(right: Taken) -> Taken:
    return right._replace(gradients=tuple(one * math.nan for one in right.gradients))


@pytest.mark.parametrize("fault", [rolled, as_one, without_a_tensor, a_little_long, for_fewer, not_a_number])
def test_a_way_that_is_wrong_is_not_taken(tiny_model: Path, fault: Any) -> None:
    adapted = tiny.load(tiny_model, "lora")
    parameters = list(moved(adapted).values())

    def wrong(*given: Any) -> Taken:
        faulty: Taken = fault(one_at_a_time(*given))
        return faulty

    ways: dict[str, Way] = {"wrong": wrong, "right": one_at_a_time, ALONE: one_at_a_time}
    assert sought(adapted, tiny_tasks.task("bert"), parameters, words(4, 3, 2), ways) == "right"
    only = {"wrong": wrong, ALONE: one_at_a_time}
    assert sought(adapted, tiny_tasks.task("bert"), parameters, words(4, 3, 2), only) == ALONE


def test_a_check_sees_what_an_adapter_that_begins_at_zero_hides(tiny_model: Path) -> None:
    """At the start B is zero, and so is every gradient of A."""
    adapted = tiny.load(tiny_model, "lora")
    named = models.trained(adapted)
    parameters = list(named.values())
    hidden = next(at for at, key in enumerate(named) if key.endswith(".A"))

    def wrong(*given: Any) -> Taken:
        right = one_at_a_time(*given)
        return right._replace(gradients=tuple(one * (at != hidden) for at, one in enumerate(right.gradients)))

    ways: dict[str, Way] = {"wrong": wrong, ALONE: one_at_a_time}
    assert sought(adapted, tiny_tasks.task("bert"), parameters, words(4, 3, 2), ways) == ALONE
    assert float(WAYS[AT_ONCE](adapted, tiny_tasks.task("bert"), parameters, words(4, 3)).gradients[hidden].norm()) == 0


def words(*lengths: int) -> list[Encoded]:
    """Texts that the tiny model knows the words of."""
    return [tiny_tasks.Toy(at, tuple(range(5 + at, 5 + at + n)), at % 3) for at, n in enumerate(lengths)]


def test_the_examples_of_a_check_are_unlike_as_far_as_there_are_such() -> None:
    """On copies of one example a way that mixes examples up would seem right."""
    texts = words(2, 5, 3, 9)
    assert unlike(texts) == [texts[3], texts[2], texts[0]]
    assert unlike([*[texts[0]] * 9, texts[2]]) == [texts[2], texts[0]]
    assert unlike([texts[1]] * 4) == [texts[1]]


class Positions(nn.Module):
    """A model whose trained layer reads no example, but one row for each token: a table of pairs of positions."""

    def __init__(self, normalised: str = "") -> None:
        super().__init__()
        self.words, self.pairs, self.out = nn.Embedding(40, 8), nn.Embedding(20, 1), nn.Linear(8, 3)
        self.norm = nn.BatchNorm1d(8) if normalised else nn.Identity()
        self.before = normalised == "before"
        self.requires_grad_(False)
        self.pairs.requires_grad_(True)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        places = torch.arange(input_ids.shape[1])
        bias = self.pairs((places[:, None] - places).abs())[..., 0]
        shares = (bias + (attention_mask[:, None] - 1) * 1e9).softmax(-1)
        vectors = self.words(input_ids)
        if self.before:
            vectors = self.norm(vectors.transpose(1, 2)).transpose(1, 2)
        read = (shares @ vectors * attention_mask[..., None]).tanh().sum(1)
        return SimpleNamespace(logits=self.out(read if self.before else self.norm(read)))


def custom(tiny_model: Path, model: nn.Module) -> tuple[AdaptedModel, list[nn.Parameter]]:
    adapted = replace(tiny.load(tiny_model), model=model)
    return adapted, [one for one in model.parameters() if one.requires_grad]


@pytest.mark.parametrize("lengths", [(3, 3, 3), (3, 2, 1), (2, 2, 2), (4, 3, 2)])
def test_a_table_with_as_many_rows_as_the_batch_is_not_taken_for_one(
    tiny_model: Path, lengths: tuple[int, ...]
) -> None:
    adapted, parameters = custom(tiny_model, Positions())
    name = sought(adapted, tiny_tasks.task("bert"), parameters, words(*lengths))
    assert name == ALONE


@pytest.mark.parametrize(("normalised", "words_of"), [("before", "keeps nothing"), ("behind", "one example alone")])
def test_a_base_that_keeps_what_it_reads_is_refused_and_left_as_it_was(
    tiny_model: Path, normalised: str, words_of: str
) -> None:
    adapted, parameters = custom(tiny_model, Positions(normalised).train())
    before = {name: one.clone() for name, one in adapted.model.state_dict().items()}
    with pytest.raises(PlanError, match=words_of):
        sought(adapted, tiny_tasks.task("bert"), parameters, words(4, 3, 2))
    assert all(torch.equal(one, before[name]) for name, one in adapted.model.state_dict().items())


def lm(tiny_llama: Path, family: Any) -> AdaptedModel:
    head = Head("AutoModelForCausalLM", "CAUSAL_LM")
    return models.load(ModelConfig(source=str(tiny_llama), device="cpu"), family.build(), head, 0)


def prompted(*lengths: int) -> list[Prompted]:
    return [
        Prompted(tuple(8 + (at + place) % 15 for place in range(n)), 1 + at % 2, "") for at, n in enumerate(lengths)
    ]


@pytest.mark.parametrize("family", [Lora(rank=2), PromptTuning(virtual_tokens=2)], ids=["lora", "prompt_tuning"])
@pytest.mark.parametrize("settings", [CausalLM(), Preference()], ids=["causal_lm", "preference"])
def test_no_token_of_one_text_weighs_less_for_those_of_another(tiny_llama: Path, family: Any, settings: Any) -> None:
    adapted, task = lm(tiny_llama, family), build_task(settings)
    parameters = list(moved(adapted).values())
    texts: list[Any] = prompted(9, 4, 6)
    if isinstance(settings, Preference):
        texts = [Pair(one, replace(one, tokens=(*one.tokens[:-1], 20, 21))) for one in texts]
    assert sought(adapted, task, parameters, texts) == AT_ONCE
    adapted.model.train()
    found = WAYS[AT_ONCE](adapted, task, parameters, texts)
    for at, text in enumerate(texts):
        wanted = alone(adapted, task, parameters, text)
        own = torch.cat([one[at].flatten() for one in found.gradients])
        assert float((own - wanted).norm() / wanted.norm()) < 1e-5
        assert float(found.losses[at]) == pytest.approx(
            float(task.loss(adapted.model, task.collate([text], 0, adapted.device)).detach()), rel=1e-5
        )


@pytest.mark.parametrize("name", ["seq2seq", "token_classification"])
def test_losses_of_examples_are_what_each_would_lose_alone(name: str, tiny_t5: Path, tiny_model: Path) -> None:
    if name == "seq2seq":
        head = Head("AutoModelForSeq2SeqLM", "SEQ_2_SEQ_LM")
        adapted = models.load(ModelConfig(source=str(tiny_t5), device="cpu"), Lora(rank=2).build(), head, 0)
        task = build_task(Seq2Seq())
        rows = [
            Example((8, 9, 10, 3), (11, 12, 3), ""),
            Example((9, 3), (10, 3), ""),
            Example((8, 3), (9, 8, 9, 3), ""),
        ]
    else:
        head = Head("AutoModelForTokenClassification", "TOKEN_CLS", ("O", "B-a", "I-a"))
        adapted = models.load(ModelConfig(source=str(tiny_model), device="cpu"), Lora(rank=2).build(), head, 0)
        task = build_task(TokenClassification(labels=("O", "B-a", "I-a")))
        rows = [Example((2, 5, 6, 7, 3), (-100, 1, 2, 0, -100), ""), Example((2, 8, 3), (-100, 0, -100), "")]
    parameters = list(moved(adapted).values())
    assert sought(adapted, task, parameters, rows) == AT_ONCE
    losses = WAYS[AT_ONCE](adapted, task, parameters, rows).losses
    expected = [float(task.loss(adapted.model, task.collate([row], 0, adapted.device)).detach()) for row in rows]
    np.testing.assert_allclose(losses.numpy(), expected, rtol=1e-5)


def test_dropout_is_drawn_for_each_example_of_its_own(tiny_model: Path) -> None:
    adapted = tiny.load(tiny_model, Lora(rank=3, alpha=5.0, dropout=0.5))
    parameters = list(moved(adapted).values())
    state = torch.get_rng_state()
    twice = [tiny_tasks.Toy(0, (5, 6, 7, 8), 1)] * 2
    assert sought(adapted, tiny_tasks.task("bert"), parameters, words(5, 4, 2)) == AT_ONCE
    assert torch.equal(torch.get_rng_state(), state)
    adapted.model.train()
    one, other = WAYS[AT_ONCE](adapted, tiny_tasks.task("bert"), parameters, twice).gradients[0]
    assert not torch.allclose(one, other)
    adapted.model.eval()
    one, other = WAYS[AT_ONCE](adapted, tiny_tasks.task("bert"), parameters, twice).gradients[0]
    torch.testing.assert_close(one, other)


def without_losses(task: Task) -> Task:
    return task._replace(losses=None)


def of_another_loss(task: Task) -> Task:
    return task._replace(loss=lambda model, batch: 2 * task.loss(model, batch))


def of_the_batch(task: Task) -> Task:
    """Losses that are not one for each example."""
    return task._replace(losses=lambda model, batch: task.loss(model, batch))


@pytest.mark.parametrize("change", [without_losses, of_another_loss, of_the_batch])
def test_a_task_that_tells_no_loss_of_one_example_is_refused_in_a_sentence(tiny_model: Path, change: Any) -> None:
    adapted = tiny.load(tiny_model)
    parameters = list(models.trained(adapted).values())
    before = [one.detach().clone() for one in parameters]
    with pytest.raises(PlanError, match="training that protects each example: expected") as refused:
        sought(adapted, change(tiny_tasks.task("bert")), parameters, words(4, 3, 2))
    assert "\n" not in str(refused.value)
    assert all(torch.equal(one, value) for one, value in zip(parameters, before, strict=True))


def test_packed_texts_are_refused(tiny_llama: Path) -> None:
    adapted = lm(tiny_llama, Lora(rank=2))
    task = build_task(CausalLM(packing=True))
    with pytest.raises(PlanError, match=r"set task\.causal_lm\.packing=false"):
        sought(adapted, task, list(models.trained(adapted).values()), prompted(5, 3))


@pytest.mark.parametrize("held", [{"weights": "bfloat16"}, {"gradient_checkpointing": True}], ids=str)
@pytest.mark.parametrize("family", ["lora", "ia3"])
def test_the_fastest_way_is_right_however_the_base_is_held(tiny_llama: Path, held: dict[str, Any], family: str) -> None:
    head = Head("AutoModelForCausalLM", "CAUSAL_LM")
    config = ModelConfig(source=str(tiny_llama), device="cpu", **held)
    adapted = models.load(config, tiny.FAMILIES[family].build(), head, 0)
    parameters = list(moved(adapted).values())
    assert sought(adapted, build_task(CausalLM()), parameters, prompted(9, 4, 6)) == AT_ONCE
