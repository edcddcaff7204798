"""Causal language modelling: an answer to a prompt, token by token (instruction tuning)."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from fedpeft.config.tasks import CausalLM
from fedpeft.errors import PlanError, sentence
from fedpeft.tasks import prompts
from fedpeft.tasks.packing import collate, pack
from fedpeft.tasks.prompts import Prompted
from fedpeft.tasks.task import Batch, Sample, Statistics, Task
from fedpeft.tasks.tokens import aligned, mean_loss, row_losses, token_figures, token_sums

_SEEN_APART = 1e-3
"""How far a logit may be from itself when a text is packed beside another; without a mask it is far more."""


def build(settings: CausalLM) -> Task:
    """The task that `settings` describe."""
    return Task(
        labels=(),
        metric=settings.metrics[0],
        require=lambda rows, place: prompts.require_answers(rows, settings, place),
        encode=lambda rows, tokenizer, place: prompts.encode(rows, tokenizer, settings, place),
        collate=partial(pack if settings.packing else collate, answer_only=settings.answer_only),
        loss=loss,
        score=score,
        figures=token_figures,
        samples=partial(samples, tokens=settings.sample_tokens),
        admit=admit_packing if settings.packing else None,
        losses=None if settings.packing else losses,
    )


def loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    """The mean cross-entropy over the learned tokens of a batch, a scalar."""
    return mean_loss(_logits(model, batch), batch["labels"][:, 1:])


def losses(model: nn.Module, batch: Batch) -> torch.Tensor:
    """The mean cross-entropy over the learned tokens of each text, `(batch,)`."""
    return row_losses(_logits(model, batch), batch["labels"][:, 1:])


def score(model: nn.Module, batch: Batch) -> Statistics:
    """Sums over the learned tokens of each example: `loss`, `tokens` and `hits`, each `(batch,)`."""
    rows = int(batch["row"].max()) + 1
    return token_sums(_logits(model, batch), batch["labels"][:, 1:], batch["row"][:, 1:], rows)


def samples(model: Any, tokenizer: Any, examples: Sequence[Prompted], tokens: int) -> tuple[Sample, ...]:
    """The greedy answer of at most `tokens` tokens to each prompt, one prompt at a time."""
    found = []
    for example in examples:
        prompt = torch.tensor([example.tokens[: example.prompt]], device=model.device)
        parts = (prompt[0], example.tokens[example.prompt :], _continued(model, tokenizer, prompt, tokens))
        found.append(Sample(*(tokenizer.decode(part, skip_special_tokens=True).strip() for part in parts)))
    return tuple(found)


def admit_packing(model: nn.Module) -> None:
    """Raises PlanError if under `model` a text that is packed beside another does not see itself alone.

    Transformers keeps packed texts apart for most decoders; others, and peft where it puts virtual tokens before
    a text, read on as if they were one. Two short texts are run together and apart to know.
    """
    texts = [Prompted(tuple(tokens), 1, "") for tokens in ((1, 2, 3, 4, 5, 6), (3, 1, 2), (2, 4, 1))]
    device = next(model.parameters()).device
    model.eval()
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        together = score(model, pack(texts, 0, device, answer_only=True))["loss"]
        apart = score(model, collate(texts, 0, device, answer_only=True))["loss"]
    if abs(together - apart).max() > _SEEN_APART:
        raise PlanError(
            sentence(
                "task.causal_lm.packing",
                expected="a base and an adapter under which packed texts do not see each other",
                found="that they do",
                remedy="set task.causal_lm.packing=false",
            )
        )


def _continued(model: Any, tokenizer: Any, prompt: torch.Tensor, tokens: int) -> torch.Tensor:
    """The tokens that follow `prompt` `(1, tokens)` greedily."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Position ids are not supported", category=UserWarning)
        made: torch.Tensor = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=tokens,
            do_sample=False,
            num_beams=1,
            pad_token_id=tokenizer.pad_token_id,
        )
    return made[0, prompt.shape[1] :]


def _logits(model: nn.Module, batch: Batch) -> torch.Tensor:
    """What is foretold of each token but the first, from those before it: `(batch, tokens - 1, vocabulary)`."""
    read = {key: batch[key] for key in ("input_ids", "attention_mask", "position_ids") if key in batch}
    logits = model(**read, use_cache=False).logits
    return aligned(logits, read["input_ids"].shape[1])[:, :-1]
