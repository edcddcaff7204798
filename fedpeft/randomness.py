"""Every random draw of a run, each from its own named stream."""

from __future__ import annotations

import hashlib

import numpy as np


def derive_seed(seed: int, *labels: int | str) -> int:
    """A 63-bit seed that depends on `seed` and on each label in order.

    The labels say what the draw is for: `derive_seed(seed, round, partition, "shuffle")`.
    """
    text = "\x1f".join([str(seed), *map(str, labels)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def rng(seed: int, *labels: int | str) -> np.random.Generator:
    """A NumPy generator for one purpose; the same arguments give the same stream on any machine."""
    return np.random.Generator(np.random.PCG64(derive_seed(seed, *labels)))
