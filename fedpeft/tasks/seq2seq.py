"""Sequence to sequence: a target text for each text, by an encoder and a decoder."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from fedpeft.config.tasks import Seq2Seq
from fedpeft.data.fields import Row
from fedpeft.errors import DataError, sentence
from fedpeft.tasks.examples import IGNORED, Example, mask, padded
from fedpeft.tasks.task import Batch, Sample, Statistics, Task
from fedpeft.tasks.tokens import aligned, mean_loss, require_room, row_losses, row_numbers, token_figures, token_sums


def build(settings: Seq2Seq) -> Task:
    """The task that `settings` describe."""
    return Task(
        labels=(),
        metric=settings.metrics[0],
        require=require_targets,
        encode=lambda rows, tokenizer, place: encode(rows, tokenizer, settings, place),
        collate=collate,
        loss=loss,
        score=partial(score, exact_match=settings.exact_match),
        figures=figures,
        samples=samples,
        losses=losses,
    )


def require_targets(rows: Sequence[Row], place: str) -> None:
    """Raises DataError, naming the row, if it has no target."""
    for at, row in enumerate(rows):
        if not row.fields.get("target"):
            raise DataError(
                sentence(
                    f"{place}, row {at + 1}",
                    expected="a text and a target",
                    found="no target",
                    remedy="fill it in or remove the row",
                )
            )


def encode(rows: Sequence[Row], tokenizer: Any, settings: Seq2Seq, place: str) -> tuple[Example, ...]:
    """The rows tokenised, each text cut at `max_tokens`; an example's label is its target's tokens.

    Raises:
        DataError: a row has no target, or one longer than `max_target_tokens`.
    """
    require_targets(rows, place)
    limit = min(settings.max_tokens, tokenizer.model_max_length)
    if not rows:
        return ()
    texts = tokenizer([row.text for row in rows], truncation=True, max_length=limit)["input_ids"]
    targets = tokenizer(text_target=[str(row.fields["target"]) for row in rows])["input_ids"]
    for at, target in enumerate(targets):
        require_room(place, at, "a target", len(target), settings.max_target_tokens, "task.seq2seq.max_target_tokens")
    return tuple(
        Example(tuple(text), tuple(target), row.group) for text, target, row in zip(texts, targets, rows, strict=True)
    )


def collate(examples: Sequence[Example], pad: int, device: torch.device) -> dict[str, torch.Tensor]:
    """A batch padded to its longest text and its longest target.

    `input_ids` and `attention_mask` (batch, tokens), `labels` and `decoder_attention_mask` (batch, target tokens).
    """
    texts = [example.tokens for example in examples]
    targets = [example.label if isinstance(example.label, tuple) else () for example in examples]
    return {
        "input_ids": padded(texts, pad, device),
        "attention_mask": mask(texts, device),
        "labels": padded(targets, IGNORED, device),
        "decoder_attention_mask": mask(targets, device),
    }


def loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    """The mean cross-entropy over the target tokens of a batch, a scalar."""
    return mean_loss(_logits(model, batch), batch["labels"])


def losses(model: nn.Module, batch: Batch) -> torch.Tensor:
    """The mean cross-entropy over each target's tokens, `(batch,)`."""
    return row_losses(_logits(model, batch), batch["labels"])


def score(model: nn.Module, batch: Batch, *, exact_match: bool) -> Statistics:
    """Sums over each target's tokens, and with `exact_match` whether the greedy answer is the target: `(batch,)`."""
    labels = batch["labels"]
    sums = token_sums(_logits(model, batch), labels, row_numbers(labels), len(labels))
    return {**sums, "exact": _exact(model, batch)} if exact_match else sums


def figures(statistics: Statistics) -> dict[str, float]:
    """Mean loss and share of hits over target tokens, perplexity, rows, and the share of exact answers if measured."""
    found = token_figures(statistics)
    return {**found, "exact_match": float(statistics["exact"].mean())} if "exact" in statistics else found


def samples(model: Any, tokenizer: Any, examples: Sequence[Example]) -> tuple[Sample, ...]:
    """The greedy answer to each text, as long as its target at most."""
    found = []
    for example in examples:
        batch = collate([example], 0, model.device)
        answer = [token for token in _answers(model, batch)[0].tolist() if token != IGNORED]
        parts = (example.tokens, example.label, answer)
        found.append(Sample(*(tokenizer.decode(part, skip_special_tokens=True).strip() for part in parts)))
    return tuple(found)


def _exact(model: nn.Module, batch: Batch) -> np.ndarray:
    labels = batch["labels"]
    same = (_answers(model, batch) == labels) | (labels == IGNORED)
    found: np.ndarray = same.all(1).cpu().numpy()
    return found


def _answers(model: Any, batch: Batch) -> torch.Tensor:
    """Greedy answers, of the width of the labels: `(batch, target tokens)`."""
    width = batch["labels"].shape[1]
    read = {key: batch[key] for key in ("input_ids", "attention_mask")}
    made = model.generate(**read, max_new_tokens=width, do_sample=False, num_beams=1)[:, 1 : width + 1]
    return torch.nn.functional.pad(made, (0, width - made.shape[1]), value=IGNORED)


def _logits(model: Any, batch: Batch) -> torch.Tensor:
    """What is foretold of each target token from the text and the tokens before it: `(batch, target tokens, words)`."""
    output = model(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        decoder_input_ids=model.prepare_decoder_input_ids_from_labels(labels=batch["labels"]),
        decoder_attention_mask=batch["decoder_attention_mask"],
        use_cache=False,
    )
    return aligned(output.logits, batch["labels"].shape[1])
