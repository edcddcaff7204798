"""Batches of prompts and answers: one text a row, or several one after another."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fedpeft.tasks.examples import IGNORED, mask, padded
from fedpeft.tasks.prompts import Prompted


def collate(
    examples: Sequence[Prompted], pad: int, device: torch.device, *, answer_only: bool
) -> dict[str, torch.Tensor]:
    """A batch padded on the right to its longest text, all of `(batch, tokens)`.

    `input_ids`, `attention_mask` (by length, as the token that pads may also end texts), `labels` and `row`.
    """
    texts = [example.tokens for example in examples]
    return {
        "input_ids": padded(texts, pad, device),
        "attention_mask": mask(texts, device),
        "labels": padded([labels_of(example, answer_only=answer_only) for example in examples], IGNORED, device),
        "row": padded([[at] * len(text) for at, text in enumerate(texts)], 0, device),
    }


def pack(examples: Sequence[Prompted], pad: int, device: torch.device, *, answer_only: bool) -> dict[str, torch.Tensor]:
    """A batch in as few rows of its longest text's length as first-fit decreasing finds, all of `(rows, tokens)`.

    `position_ids` begin again at each text, and no mask is given: by that transformers knows texts that are packed,
    and lets each see itself alone. `row` says which example a position is of.
    """
    bins = _first_fit([example.size for example in examples])
    texts = [[token for at in members for token in examples[at].tokens] for members in bins]
    width = max(map(len, texts))
    positions = [
        [*(p for at in members for p in range(examples[at].size)), *range(width - len(text))]
        for members, text in zip(bins, texts, strict=True)
    ]
    labels = [
        [label for at in members for label in labels_of(examples[at], answer_only=answer_only)] for members in bins
    ]
    return {
        "input_ids": padded(texts, pad, device),
        "position_ids": padded(positions, 0, device),
        "labels": padded(labels, IGNORED, device),
        "row": padded([[at for at in members for _ in examples[at].tokens] for members in bins], 0, device),
    }


def labels_of(example: Prompted, *, answer_only: bool) -> tuple[int, ...]:
    """The tokens that are learned, `IGNORED` where one is not; the first is foretold by nothing."""
    before = max(1, example.prompt) if answer_only else 1
    return (*(IGNORED for _ in range(before)), *example.tokens[before:])


def _first_fit(sizes: Sequence[int]) -> list[list[int]]:
    """Indices of `sizes` in bins of the largest size, longest first, each into the first bin with room for it."""
    bins: list[list[int]] = []
    room: list[int] = []
    for at in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        place = next((number for number, left in enumerate(room) if left >= sizes[at]), len(bins))
        if place == len(bins):
            bins.append([])
            room.append(max(sizes))
        bins[place].append(at)
        room[place] -= sizes[at]
    return bins
