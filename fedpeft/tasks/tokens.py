"""What tasks that judge each token share: logits beside labels, sums over the tokens of a row, and their figures."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch.nn import functional

from fedpeft.errors import DataError, sentence
from fedpeft.tasks.examples import IGNORED
from fedpeft.tasks.task import Statistics

_GREATEST = 700.0
"""Of greater losses the exponential is no finite number."""


def aligned(logits: torch.Tensor, width: int) -> torch.Tensor:
    """The logits of the last `width` positions `(batch, width, outputs)`: those of virtual tokens stand before."""
    return logits[:, logits.shape[1] - width :]


def mean_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The mean cross-entropy over the tokens that have a label; logits `(..., outputs)`, labels `(...)`.

    It is taken in float32, of the labelled positions only. Without any it is 0.
    """
    kept = labels != IGNORED
    total = functional.cross_entropy(logits[kept].float(), labels[kept], reduction="sum")
    return total / kept.sum().clamp_min(1)


def row_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The mean cross-entropy over the labelled tokens of each row `(rows,)`; logits `(rows, tokens, outputs)`.

    It is taken in float32, and is 0 for a row without any.
    """
    kept = labels != IGNORED
    each = functional.cross_entropy(logits[kept].float(), labels[kept], reduction="none")
    totals = each.new_zeros(len(labels)).index_add(0, kept.nonzero()[:, 0], each)
    return totals / kept.sum(1).clamp_min(1)


def token_sums(logits: torch.Tensor, labels: torch.Tensor, row: torch.Tensor, rows: int) -> Statistics:
    """Sums over the labelled tokens of each row: `loss`, `tokens` and `hits` (those foretold rightly), each `(rows,)`.

    `row` `(...)` says which row a position belongs to.
    """
    kept = labels != IGNORED
    scores, truth = logits[kept].float(), labels[kept]
    at = row[kept].cpu().numpy()
    losses = functional.cross_entropy(scores, truth, reduction="none").cpu().numpy().astype(np.float64)
    hits = (scores.argmax(-1) == truth).cpu().numpy()
    return {
        "loss": np.bincount(at, losses, rows),
        "tokens": np.bincount(at, minlength=rows).astype(np.int64),
        "hits": np.bincount(at, hits, rows).astype(np.int64),
    }


def row_numbers(labels: torch.Tensor) -> torch.Tensor:
    """For each position of `labels` `(rows, tokens)` its row."""
    return torch.arange(len(labels), device=labels.device)[:, None].expand_as(labels)


def token_figures(statistics: Statistics) -> dict[str, float]:
    """Mean loss and share of hits over all tokens, the perplexity, and the number of rows."""
    tokens = max(1, int(statistics["tokens"].sum()))
    loss = float(statistics["loss"].sum()) / tokens
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, _GREATEST)),
        "token_accuracy": float(statistics["hits"].sum()) / tokens,
        "rows": len(statistics["tokens"]),
    }


def require_room(place: str, row: int, what: str, tokens: int, most: int, key: str) -> None:
    """Raises DataError, naming the row, if what is to be learned has more than the `most` tokens that `key` leaves."""
    if tokens > most:
        raise DataError(
            sentence(
                f"{place}, row {row + 1}",
                expected=f"{what} of at most {most} tokens, because what is learned is never cut",
                found=f"{tokens}",
                remedy=f"shorten it, or raise {key} if the model has positions for more",
            )
        )
