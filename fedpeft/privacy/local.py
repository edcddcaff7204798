"""Local differential privacy: each client adds noise to its own update, and need trust nobody."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from fedpeft.privacy.entropy import SOURCES, normal_like
from fedpeft.stages import Stage, chain, clip, identity
from fedpeft.updates import Memory, Update


def noisy(clip_norm: float, noise_multiplier: float) -> Stage:
    """The update clipped to C = `clip_norm`, plus Gaussian noise of standard deviation z C on every number.

    The noise is the operating system's. Any two updates of a client are at most 2 C apart, so a round costs what one
    Gaussian with noise multiplier z / 2 does; whatever the server does afterwards costs nothing.

    Source: Dwork and Roth 2014, "The Algorithmic Foundations of Differential Privacy", appendix A, at each client.
    """

    def client(update: Update, memory: Memory) -> tuple[Update, Memory]:
        draw = SOURCES["os"](0)
        noise = normal_like(draw, {key: value.shape for key, value in update.delta.items()})
        deviation = noise_multiplier * clip_norm
        delta = {key: (value + deviation * noise[key]).astype(np.float32) for key, value in update.delta.items()}
        return replace(update, delta=delta), memory

    return chain(clip(clip_norm), identity()._replace(client=client))
