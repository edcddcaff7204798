"""Error feedback: what a codec loses of one update is added to the same client's next.

The residual e lies in the client's memory. Sent is Q(Δ + e), and e becomes (Δ + e) − Q(Δ + e): what should have been
sent less what decoding gives. It takes for granted that what was sent was used; an update that comes too late is gone.

Source: Karimireddy et al. 2019, "Error Feedback Fixes SignSGD and other Gradient Compression Schemes", algorithm 2.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from fedpeft.adapters import fit, norm
from fedpeft.strategy import Strategy
from fedpeft.updates import Memory, Update
from fedpeft.wire import Packet, Scalar, encoded, fit_reply

RESIDUAL = "feedback/"
"""What a memory's keys begin with where it keeps what was lost of a tensor."""

ERROR = "codec_error"
"""The figure that says how long what was lost is, as a share of what should have been sent."""


def reply(
    strategy: Strategy, update: Update, memory: Memory, manifest: Mapping[str, Scalar], rank: int
) -> tuple[Packet, Memory]:
    """The packet that carries the update of a client that is at `rank` now, and its memory after it."""
    codec = strategy.codec
    if codec.exact or update.silent:
        return fit_reply(strategy, update, manifest, rank), memory
    owed = {
        key: fit(memory.tensors[f"{RESIDUAL}{key}"], value.shape)
        for key, value in update.delta.items()
        if f"{RESIDUAL}{key}" in memory.tensors
    }
    wanted = {key: value + owed.get(key, np.float32(0)) for key, value in update.delta.items()}
    update = replace(update, delta=wanted)
    body = encoded(strategy, update, manifest)
    decoded = codec.decode(body, update.spec)
    lost = {key: value - decoded[key] for key, value in wanted.items()}
    error = norm(lost) / (norm(wanted) or 1.0)
    packet = fit_reply(strategy, replace(update, metrics={**update.metrics, ERROR: error}), manifest, rank, body)
    kept = {f"{RESIDUAL}{key}": value for key, value in lost.items()} if codec.remembers else {}
    return packet, Memory({**memory.tensors, **kept}, memory.fields)
