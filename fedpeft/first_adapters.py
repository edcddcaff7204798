"""The first adapter without sending it: a node that has the base and the run's settings can build it for itself.

What nobody has trained yet follows from the base, the settings and the run's seed. So the server says the SHA-256 of it
in place of its numbers, and a node that comes to other bits says so, and is sent the numbers when it is asked again.
"""

from __future__ import annotations

import hashlib

from fedpeft.adapters import AdapterSpec, AdapterState, Tensors, resized
from fedpeft.codecs import dense
from fedpeft.errors import PacketError, sentence
from fedpeft.strategy import Strategy
from fedpeft.wire import Packet, shown

BUILT = "built"
"""The field of a request that says the SHA-256 of what a node is to build for itself."""

_EXACT = dense()


def untrained(strategy: Strategy, spec: AdapterSpec, round_: int) -> AdapterSpec:
    """What of an adapter of `spec` is after round `round_` as it was before the first."""
    if round_ == 0:
        return spec
    return spec.only((*strategy.stage.constant(spec), *strategy.stage.local(spec, 1)))


def fingerprint(tensors: Tensors, spec: AdapterSpec) -> str:
    """The SHA-256 of the tensors of `spec`, cut to its ranks, in hexadecimal digits."""
    return hashlib.sha256(_EXACT.encode(resized(tensors, spec), spec)).hexdigest()


def built(packet: Packet, start: AdapterState, spec: AdapterSpec) -> Tensors:
    """The tensors of `spec` of `start`, the adapter before any training.

    Raises:
        PacketError: they are not those that the request tells of.
    """
    wanted, tensors = packet.manifest.get(BUILT), resized(start.tensors, spec)
    found = fingerprint(tensors, spec)
    if wanted != found:
        raise PacketError(
            sentence(
                "first adapter, as this node builds it",
                expected=f"SHA-256 {shown(wanted)[:14]}",
                found=found[:12],
                remedy="ask again; it will be sent; or use the same releases of torch and peft on both sides, or set "
                'aggregation.first = "sent"',
            )
        )
    return tensors
