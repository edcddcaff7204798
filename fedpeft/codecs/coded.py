"""A codec put together: fewer numbers, fewer bits a number, fewer bytes."""

from __future__ import annotations

import numpy as np

from fedpeft.adapters import AdapterSpec, Tensors
from fedpeft.codecs.codec import Codec
from fedpeft.codecs.entropy import CHECK_BYTES, Entropy, opened, sealed, stored
from fedpeft.codecs.reduction import Reduction, everything
from fedpeft.codecs.rounding import MOST, Rounding, float32
from fedpeft.errors import AdapterError, PacketError, sentence


def coded(
    reduction: Reduction | None = None,
    rounding: Rounding | None = None,
    entropy: Entropy | None = None,
    *,
    heads: Rounding | None = None,
    remembers: bool = False,
) -> Codec:
    """What `reduction` leaves of the numbers, rounded, then packed; what is not given changes nothing.

    What is trained whole beside an adapter (heads, biases: modules of kind `full`) travels first, rounded by `heads`
    alone, except where there is nothing else. Then what the reduction says, then the rounded numbers, then a checksum
    of it all. With `remembers` a client adds to each update what was lost of those before (see `fedpeft.feedback`).
    """
    reduced, rounded, packed = reduction or everything(), rounding or float32(), entropy or stored()
    by_heads, as_is = heads or float32(), everything()

    def raw(spec: AdapterSpec) -> tuple[AdapterSpec, AdapterSpec, tuple[int, int, int]]:
        whole, rest = apart(spec)
        side, count = reduced.sizes(rest.shapes)
        return whole, rest, (by_heads.size(whole.parameters), side, count)

    def length(spec: AdapterSpec) -> int:
        own, side, count = raw(spec)[2]
        return own + side + rounded.size(count) + CHECK_BYTES

    def encode(tensors: Tensors, spec: AdapterSpec, random: np.random.Generator | None = None) -> bytes:
        whole, rest, _ = raw(spec)
        spec.require(tensors, "update to encode")
        _require_range(tensors, spec if heads else rest)
        side, values = reduced.encode(tensors, rest.shapes)
        first = by_heads.encode(as_is.encode(tensors, whole.shapes)[1], random)
        return packed.pack(sealed(first + side + rounded.encode(values, random)))

    def decode(data: bytes, spec: AdapterSpec) -> Tensors:
        whole, rest, (own, side, count) = raw(spec)
        body = opened(packed.unpack(data, length(spec)))
        values = rounded.decode(body[own + side :], count)
        first = as_is.decode(b"", by_heads.decode(body[:own], whole.parameters), whole.shapes)
        found = {**first, **reduced.decode(body[own : own + side], values, rest.shapes)}
        _require_finite(found)
        return {key: found[key] for key in spec.shapes}

    error = max(rounded.error, by_heads.error)
    return Codec(
        encode,
        decode,
        lambda spec: packed.size(length(spec)),
        additive=False,
        expands_norm=error > 0 or remembers or not reduced.faithful,
        exact=reduced.exact and error == 0,
        contracts=error < 1 and (reduced.faithful or rounded.error == 0),
        remembers=remembers,
    )


def apart(spec: AdapterSpec) -> tuple[AdapterSpec, AdapterSpec]:
    """The specifications of what travels whole, and of what is coded."""
    rest = tuple(module for module in spec.modules if module.kind != "full")
    coded_keys = [f"{module.path}.{name}" for module in rest or spec.modules for name, _ in module.shapes]
    chosen = set(coded_keys)
    return spec.only(key for key in spec.shapes if key not in chosen), spec.only(chosen)


def _require_range(tensors: Tensors, spec: AdapterSpec) -> None:
    """Raises AdapterError for numbers that no rounding can hold."""
    for key in spec.shapes:
        if tensors[key].size and float(np.abs(tensors[key]).max()) > MOST:
            raise AdapterError(
                sentence(
                    f"update to encode, tensor {key}",
                    expected=f"numbers of at most {MOST:g}",
                    found="greater ones",
                    remedy="lower the learning rate or clip the update",
                )
            )


def _require_finite(tensors: Tensors) -> None:
    for key, value in tensors.items():
        if not np.isfinite(value).all():
            raise PacketError(
                sentence(
                    f"coded payload, tensor {key}",
                    expected="finite numbers",
                    found="NaN or infinity",
                    remedy="lower the learning rate or clip the update",
                )
            )
