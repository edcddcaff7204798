"""What goes down as deltas: from the adapter as clients have it to the server's, or as near to it as a codec comes.

What the codec loses of one delta is part of the next, because that begins from what clients have. Those who were not
sent the delta before are sent what the others have, in float32.

Source: Tang et al. 2019, "DoubleSqueeze: Parallel Stochastic Gradient Descent with Double-Pass Error-Compensated
Compression", algorithm 1, the server's side.
"""

from __future__ import annotations

import numpy as np

from fedpeft.adapters import AdapterSpec, AdapterState, Tensors
from fedpeft.codecs.codec import Codec
from fedpeft.randomness import rng
from fedpeft.updates import Sent, ServerState


def first_sent(codec: Codec, tensors: Tensors, spec: AdapterSpec) -> Sent:
    """What is sent before round 1: the tensors of `spec` as they are."""
    return Sent() if codec.additive else Sent({key: tensors[key] for key in spec.shapes})


def next_sent(codec: Codec, before: Sent, state: ServerState, spec: AdapterSpec) -> Sent:
    """What is sent after the round that led to `state`; `before` is what was sent in it.

    Raises:
        PacketError: the delta is beyond float32.
    """
    if codec.additive:
        return before
    wanted = {key: state.adapter.tensors[key] - before.tensors[key] for key in spec.shapes}
    delta = codec.encode(wanted, spec, rng(state.seed, state.round, "downlink"))
    return Sent(moved(codec, before.tensors, delta, spec), delta)


def moved(codec: Codec, tensors: Tensors, delta: bytes, spec: AdapterSpec) -> Tensors:
    """The tensors of `spec` after a delta; on the server and on every client to the same bit.

    Raises:
        PacketError: the delta is not what the codec makes.
    """
    decoded = codec.decode(delta, spec)
    with np.errstate(over="ignore"):  # an adapter that is not finite is refused where it is read
        return {key: tensors[key] + decoded[key] for key in spec.shapes}


def as_sent(state: ServerState) -> AdapterState:
    """The adapter that clients train from in the round after `state`."""
    adapter = state.adapter
    return AdapterState(adapter.spec, {**adapter.tensors, **state.sent.tensors}, adapter.residual)
