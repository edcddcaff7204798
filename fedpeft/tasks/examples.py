"""Examples: rows as a task has encoded them, and batches of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

IGNORED = -100
"""The label of a token that no loss is taken of."""


class Encoded(Protocol):
    """A row as a task encoded it; what else it holds, its own task's `collate` knows."""

    @property
    def group(self) -> str:
        """The row's natural group, or nothing."""
        ...

    @property
    def size(self) -> int:
        """How much of a batch it takes up: tokens for a text. Batches hold examples of like size."""
        ...


@dataclass(frozen=True)
class Example:
    """A tokenised text: its token ids, its label, and its natural group.

    `label` is the index of the text's label, or one number a token (`IGNORED` where no loss is taken), or the tokens
    of a target.
    """

    tokens: tuple[int, ...]
    label: int | tuple[int, ...]
    group: str

    @property
    def size(self) -> int:
        """Its tokens, those of a longer target if it has one."""
        return max(len(self.tokens), len(self.label) if isinstance(self.label, tuple) else 0)


def padded(texts: Sequence[Sequence[int]], fill: int, device: torch.device) -> torch.Tensor:
    """The texts padded on the right with `fill` to the longest: `(texts, tokens)`."""
    found = np.full((len(texts), max(map(len, texts))), fill, np.int64)
    for at, text in enumerate(texts):
        found[at, : len(text)] = text
    return torch.from_numpy(found).to(device)


def mask(texts: Sequence[Sequence[int]], device: torch.device) -> torch.Tensor:
    """1 where `padded` has a token of the text, whatever its number, and 0 where it has padding."""
    return padded([[1] * len(text) for text in texts], 0, device)
