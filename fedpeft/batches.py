"""Which examples a client trains on together: in turn, or for a private step each by a coin of its own."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import islice

import numpy as np

from fedpeft.privacy.entropy import Uniforms
from fedpeft.privacy.examples import poisson
from fedpeft.randomness import rng
from fedpeft.tasks import Encoded

_WINDOW_BATCHES = 8
"""Examples of like size are sought within this many batches of the shuffled rows."""


def batches_from(
    examples: Sequence[Encoded], batch_size: int, seed: int, partition: int, position: int
) -> Iterator[list[Encoded]]:
    """Batches without end, from the one numbered `position` on.

    Every epoch goes through all examples in a new order; a batch holds examples of like size.
    """
    per_epoch = math.ceil(len(examples) / batch_size)
    epoch, skipped = divmod(position, per_epoch)
    while True:
        for batch in _epoch(examples, batch_size, rng(seed, partition, epoch, "batches"))[skipped:]:
            yield [examples[i] for i in batch]
        epoch, skipped = epoch + 1, 0


def each_once(batches: Iterator[list[Encoded]], accumulation: int) -> Iterator[list[Encoded]]:
    """The examples of so many batches together; one that comes again, as a new epoch has begun, is left out."""
    while True:
        yield list({id(example): example for batch in islice(batches, accumulation) for example in batch}.values())


def by_coin(examples: Sequence[Encoded], rate: float, draw: Uniforms) -> Iterator[list[Encoded]]:
    """The examples of one step after another, each in it with probability `rate`, the longest first."""
    while True:
        yield sorted((examples[at] for at in poisson(draw, len(examples), rate)), key=lambda example: -example.size)


def _epoch(examples: Sequence[Encoded], batch_size: int, random: np.random.Generator) -> list[np.ndarray]:
    order = random.permutation(len(examples))
    lengths = np.array([examples[i].size for i in order])
    window = _WINDOW_BATCHES * batch_size
    starts = range(0, len(order), window)
    order = np.concatenate([order[s : s + window][np.argsort(lengths[s : s + window], kind="stable")] for s in starts])
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    return [batches[i] for i in random.permutation(len(batches))]
