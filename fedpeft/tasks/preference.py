"""Preference: of two answers to a prompt the one that people chose (direct preference optimisation, DPO)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from fedpeft.config.tasks import CausalLM, Preference
from fedpeft.data.fields import Row
from fedpeft.errors import DataError, sentence
from fedpeft.own_layers import disabled
from fedpeft.tasks.causal_lm import samples as greedy_answers
from fedpeft.tasks.examples import IGNORED
from fedpeft.tasks.packing import collate as collate_texts
from fedpeft.tasks.prompts import Prompted
from fedpeft.tasks.prompts import encode as encode_answers
from fedpeft.tasks.task import Batch, Sample, Statistics, Task
from fedpeft.tasks.tokens import aligned


@dataclass(frozen=True)
class Pair:
    """Two tokenised answers to one prompt, whose tokens are the same in both, and the row's group."""

    chosen: Prompted
    rejected: Prompted

    @property
    def group(self) -> str:
        """The row's natural group, or nothing."""
        return self.chosen.group

    @property
    def size(self) -> int:
        """The tokens of both."""
        return self.chosen.size + self.rejected.size


def build(settings: Preference) -> Task:
    """The task that `settings` describe."""
    return Task(
        labels=(),
        metric=settings.metrics[0],
        require=require_pairs,
        encode=lambda rows, tokenizer, place: encode(rows, tokenizer, settings, place),
        collate=collate,
        loss=partial(loss, settings=settings),
        score=partial(score, settings=settings),
        figures=figures,
        samples=partial(samples, tokens=settings.sample_tokens),
        losses=partial(losses, settings=settings),
        copies=2,
    )


def require_pairs(rows: Sequence[Row], place: str) -> None:
    """Raises DataError, naming the row, if it lacks an answer or both are the same."""
    for at, row in enumerate(rows):
        chosen, rejected = (row.fields.get(role, "") for role in ("chosen", "rejected"))
        if not chosen or not rejected or chosen == rejected:
            lacks = "no chosen answer" if not chosen else "no rejected answer"
            raise DataError(
                sentence(
                    f"{place}, row {at + 1}",
                    expected="a text, a chosen answer and another that was rejected",
                    found=lacks if not chosen or not rejected else "the same answer twice",
                    remedy="correct the row or remove it",
                )
            )


def encode(rows: Sequence[Row], tokenizer: Any, settings: Preference, place: str) -> tuple[Pair, ...]:
    """The rows put into words and tokenised; a prompt too long for the longer answer is cut for both alike.

    Raises:
        DataError: a row lacks an answer, has the same twice, or one longer than `max_tokens`.
    """
    require_pairs(rows, place)
    wording = CausalLM(max_tokens=settings.max_tokens, chat=settings.chat, template=settings.template)
    chosen, rejected = (
        encode_answers([_answered(row, role) for row in rows], tokenizer, wording, place, "task.preference")
        for role in ("chosen", "rejected")
    )
    return tuple(_alike(*pair) for pair in zip(chosen, rejected, strict=True))


def collate(examples: Sequence[Pair], pad: int, device: torch.device) -> dict[str, torch.Tensor]:
    """A batch of all chosen answers and then all rejected ones, each of (2 x batch, tokens).

    `input_ids`, `attention_mask` and `labels`, which are of the answers' tokens alone.
    """
    texts = [*(pair.chosen for pair in examples), *(pair.rejected for pair in examples)]
    return collate_texts(texts, pad, device, answer_only=True)


def loss(model: nn.Module, batch: Batch, *, settings: Preference) -> torch.Tensor:
    """The mean DPO loss of a batch, a scalar.

    −log σ(β((log π(chosen) − log ref(chosen)) − (log π(rejected) − log ref(rejected)))), where π is the model and ref
    the same without its adapter, and so the bare base: without dropout, without a prompt's virtual tokens, and also
    without what a merge has laid beside the base as a residual, so that over a federation's rounds the reference
    stays where it was. The log of an answer is the sum over its tokens. With `label_smoothing` ε, 1 − ε of this
    and ε of the same with the answers exchanged.

    Source: Rafailov et al. 2023, "Direct Preference Optimization: Your Language Model is Secretly a Reward Model",
    eq. 7; label smoothing: Mitchell 2023, "A note on DPO with noisy preferences & relationship to IPO", eq. 3.
    """
    return losses(model, batch, settings=settings).mean()


def losses(model: nn.Module, batch: Batch, *, settings: Preference) -> torch.Tensor:
    """The DPO loss of each pair, `(batch,)`."""
    return _losses(*_rewards(model, batch, settings), settings)


def score(model: nn.Module, batch: Batch, *, settings: Preference) -> Statistics:
    """The `loss` of each pair and the rewards β log(π / ref) of its `chosen` and `rejected` answers: `(batch,)`."""
    chosen, rejected = _rewards(model, batch, settings)
    found = {"loss": _losses(chosen, rejected, settings), "chosen": chosen, "rejected": rejected}
    return {key: values.cpu().numpy().astype(np.float64) for key, values in found.items()}


def figures(statistics: Statistics) -> dict[str, float]:
    """Mean loss, share of pairs whose chosen answer has the higher reward, mean difference, and the number of rows."""
    margins = statistics["chosen"] - statistics["rejected"]
    return {
        "loss": float(statistics["loss"].mean()),
        "reward_accuracy": float((margins > 0).mean()),
        "margin": float(margins.mean()),
        "rows": len(margins),
    }


def samples(model: Any, tokenizer: Any, examples: Sequence[Pair], tokens: int) -> tuple[Sample, ...]:
    """The greedy answer of at most `tokens` tokens to each prompt, beside the chosen one."""
    return greedy_answers(model, tokenizer, [pair.chosen for pair in examples], tokens)


def _answered(row: Row, role: str) -> Row:
    return replace(row, fields={"answer": row.fields[role]})


def _alike(chosen: Prompted, rejected: Prompted) -> Pair:
    """The pair with the shorter of both prompts, which is the end of the longer, before both answers."""
    prompt = min(chosen, rejected, key=lambda one: one.prompt)
    before = prompt.tokens[: prompt.prompt]
    one, other = (
        replace(each, tokens=(*before, *each.tokens[each.prompt :]), prompt=len(before)) for each in (chosen, rejected)
    )
    return Pair(one, other)


def _rewards(model: nn.Module, batch: Batch, settings: Preference) -> tuple[torch.Tensor, torch.Tensor]:
    """β log(π / ref) of the chosen and of the rejected answers, each `(batch,)`."""
    with torch.no_grad(), _reference(model):
        reference = _log_likelihoods(model, batch)
    rewards = settings.beta * (_log_likelihoods(model, batch) - reference)
    chosen, rejected = rewards.chunk(2)
    return chosen, rejected


def _losses(chosen: torch.Tensor, rejected: torch.Tensor, settings: Preference) -> torch.Tensor:
    margins, smoothing = chosen - rejected, settings.label_smoothing
    return -(1 - smoothing) * functional.logsigmoid(margins) - smoothing * functional.logsigmoid(-margins)


def _log_likelihoods(model: nn.Module, batch: Batch) -> torch.Tensor:
    """The log probability of each text's answer, the sum over its tokens: `(texts,)`."""
    read = {key: batch[key] for key in ("input_ids", "attention_mask")}
    logits = model(**read, use_cache=False).logits
    labels = batch["labels"][:, 1:]
    kept = labels != IGNORED
    foretold = aligned(logits, read["input_ids"].shape[1])[:, :-1][kept].float()
    found = -functional.cross_entropy(foretold, labels[kept], reduction="none")
    return found.new_zeros(len(labels)).index_add(0, kept.nonzero()[:, 0], found)


@contextlib.contextmanager
def _reference(model: nn.Module) -> Iterator[None]:
    """Inside, `model` is the bare base in evaluation mode; after it, it is as before, down to what is trained.

    Peft sets what takes a gradient anew when it switches an adapter on again, also where a merge holds still a part.
    Inside nothing takes one, so that autocast, which keeps its copies of what does, takes no copy of one for the other.
    """
    modes = [(module, module.training) for module in model.modules()]
    learned = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.eval()
        with disabled(model):
            for parameter, _ in learned:
                parameter.requires_grad_(False)
            yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, is_learned in learned:
            parameter.requires_grad_(is_learned)
