"""Token classification: a BIO tag for each word."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import nn

from fedpeft.config.tasks import TokenClassification, is_bio
from fedpeft.data.fields import Row
from fedpeft.errors import DataError, sentence
from fedpeft.tasks.examples import IGNORED, Example, mask, padded
from fedpeft.tasks.spans import spans
from fedpeft.tasks.task import Batch, Statistics, Task
from fedpeft.tasks.tokens import aligned, mean_loss, require_room, row_losses, row_numbers, token_sums


def build(settings: TokenClassification) -> Task:
    """The task that `settings` describe."""
    return Task(
        labels=settings.labels,
        metric=settings.metrics[0],
        require=lambda rows, place: require_tags(rows, settings, place),
        encode=lambda rows, tokenizer, place: encode(rows, tokenizer, settings, place),
        collate=collate,
        loss=loss,
        score=lambda model, batch: score(model, batch, settings.labels),
        figures=figures,
        losses=losses,
    )


def complete(settings: TokenClassification, rows: Sequence[Row]) -> TokenClassification:
    """The settings with `O` and both tags of each kind that `rows` have, sorted, where they name none.

    Raises:
        DataError: a tag is not of the form BIO.
    """
    if settings.labels:
        return settings
    seen = {tag for row in rows for tag in _texts(row, "tags")}
    for tag in sorted(seen):
        if not is_bio(tag):
            raise _unknown("the training rows", ("O", "B-KIND", "I-KIND"), tag)
    kinds = sorted({tag[2:] for tag in seen if tag != "O"})
    return replace(settings, labels=("O", *(f"{position}-{kind}" for kind in kinds for position in "BI")))


def require_tags(rows: Sequence[Row], settings: TokenClassification, place: str) -> None:
    """Raises DataError, naming the row, if it has not one known tag for each word."""
    for at, row in enumerate(rows):
        words, tags = _texts(row, "words"), _texts(row, "tags")
        if not words or len(words) != len(tags):
            raise DataError(
                sentence(
                    f"{place}, row {at + 1}",
                    expected="words, and as many tags",
                    found=f"{len(words)} words and {len(tags)} tags",
                    remedy="correct the row",
                )
            )
        for tag in tags:
            if tag not in settings.labels:
                raise _unknown(f"{place}, row {at + 1}", settings.labels, tag)


def encode(rows: Sequence[Row], tokenizer: Any, settings: TokenClassification, place: str) -> tuple[Example, ...]:
    """The rows tokenised; the first piece of a word has the number of the word's tag, every other token none.

    A word of which the tokenizer makes nothing is left out.

    Raises:
        DataError: a row has not one known tag for each word, or is longer than `max_tokens`.
    """
    require_tags(rows, settings, place)
    numbers = {name: number for number, name in enumerate(settings.labels)}
    limit = min(settings.max_tokens, tokenizer.model_max_length)
    if not rows:
        return ()
    texts = [" ".join(_texts(row, "words")) for row in rows]
    made = tokenizer(texts, return_offsets_mapping=True, return_special_tokens_mask=True)
    examples = []
    for at, row in enumerate(rows):
        ids, tags = made["input_ids"][at], _texts(row, "tags")
        require_room(place, at, "words", len(ids), limit, "task.token_classification.max_tokens")
        first = _first_pieces(_texts(row, "words"), made["offset_mapping"][at], made["special_tokens_mask"][at])
        labels = tuple(numbers[tags[first[i]]] if i in first else IGNORED for i in range(len(ids)))
        examples.append(Example(tuple(ids), labels, row.group))
    return tuple(examples)


def collate(examples: Sequence[Example], pad: int, device: torch.device) -> dict[str, torch.Tensor]:
    """A batch padded to its longest: `input_ids`, `attention_mask` and `labels`, each (batch, tokens)."""
    texts = [example.tokens for example in examples]
    labels = [example.label if isinstance(example.label, tuple) else () for example in examples]
    return {
        "input_ids": padded(texts, pad, device),
        "attention_mask": mask(texts, device),
        "labels": padded(labels, IGNORED, device),
    }


def loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    """The mean cross-entropy over the words of a batch, a scalar."""
    return mean_loss(_logits(model, batch), batch["labels"])


def losses(model: nn.Module, batch: Batch) -> torch.Tensor:
    """The mean cross-entropy over each text's words, `(batch,)`."""
    return row_losses(_logits(model, batch), batch["labels"])


def score(model: nn.Module, batch: Batch, names: Sequence[str]) -> Statistics:
    """Sums over each row's words, and its number of entities `true`, `guessed` and `matched`, each `(batch,)`."""
    logits, labels = _logits(model, batch), batch["labels"]
    predicted, truth = logits.argmax(-1).cpu().numpy(), labels.cpu().numpy()
    counts = np.array([_entities(*pair, names) for pair in zip(truth, predicted, strict=True)], np.int64)
    sums = token_sums(logits, labels, row_numbers(labels), len(labels))
    return {**sums, **dict(zip(("true", "guessed", "matched"), counts.T, strict=True))}


def figures(statistics: Statistics) -> dict[str, float]:
    """Mean loss and accuracy over words, F1 over entities that are right in bounds and kind, and the number of rows.

    Where there is no entity and none was guessed, F1 is 1.
    """
    words = max(1, int(statistics["tokens"].sum()))
    both = int(statistics["true"].sum() + statistics["guessed"].sum())
    return {
        "loss": float(statistics["loss"].sum()) / words,
        "accuracy": float(statistics["hits"].sum()) / words,
        "entity_f1": 2 * float(statistics["matched"].sum()) / both if both else 1.0,
        "rows": len(statistics["tokens"]),
    }


def _logits(model: nn.Module, batch: Batch) -> torch.Tensor:
    output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    return aligned(output.logits, batch["labels"].shape[1])


def _entities(truth: np.ndarray, predicted: np.ndarray, names: Sequence[str]) -> tuple[int, int, int]:
    words = truth != IGNORED
    true, guessed = (spans([names[number] for number in numbers[words]]) for numbers in (truth, predicted))
    return len(true), len(guessed), len(true & guessed)


def _first_pieces(words: Sequence[str], offsets: Sequence[tuple[int, int]], special: Sequence[int]) -> dict[int, int]:
    """From the first piece of each word to the word; a piece belongs to the word that its last letter is of."""
    ends = list(accumulate((len(word) + 1 for word in words), initial=0))
    word_of = np.repeat(np.arange(len(words)), np.diff(ends))
    first: dict[int, int] = {}
    for piece, ((start, end), is_special) in enumerate(zip(offsets, special, strict=True)):
        if not is_special and end > start:
            first.setdefault(int(word_of[end - 1]), piece)
    return {piece: word for word, piece in first.items()}


def _texts(row: Row, role: str) -> tuple[str, ...]:
    value = row.fields.get(role, ())
    return tuple(map(str, value)) if isinstance(value, tuple) else tuple(value.split())


def _unknown(place: str, labels: Sequence[str], found: str) -> DataError:
    return DataError(
        sentence(
            place,
            expected=f"tags among {', '.join(labels)}",
            found=repr(found),
            remedy="correct the row, or name the tag in task.token_classification.labels",
        )
    )
