"""Secrets shared so that any `threshold` holders can rebuild one and fewer learn nothing.

The field is that of the integers modulo 2^256 + 297, the least prime above 2^256: every secret of 32 bytes is an
element, and a share takes 33 bytes. A larger prime of a handier form, such as 2^521 − 1, would double the shares for
sums that take a thousandth of a client's time.

Source: Shamir 1979, "How to Share a Secret".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache

from fedpeft.errors import FederationError, sentence
from fedpeft.privacy.secure.entropy import Entropy, below

PRIME = 2**256 + 297
SECRET_BYTES = 32
SHARE_BYTES = 33


def split(secret: bytes, threshold: int, holders: Sequence[int], entropy: Entropy) -> dict[int, bytes]:
    """A share for each holder, by number from 0; any `threshold` of them give the secret (32 bytes) back."""
    points = [holder + 1 for holder in holders]
    shares = evaluate(int.from_bytes(secret, "big"), threshold, points, entropy)
    return {holder: share.to_bytes(SHARE_BYTES, "big") for holder, share in zip(holders, shares, strict=True)}


def join(shares: Mapping[int, bytes], threshold: int) -> bytes:
    """The secret, 32 bytes, from the shares of at least `threshold` holders; the first by number are used.

    Raises:
        FederationError: there are fewer, or they are no shares of one secret.
    """
    used = sorted(shares)[:threshold]
    values = [int.from_bytes(shares[holder], "big") for holder in used]
    if len(used) < threshold or max(values) >= PRIME:
        raise _unusable(f"{threshold} shares, each below the field's prime", f"{len(used)} of {SHARE_BYTES} bytes")
    secret = interpolate(tuple(holder + 1 for holder in used), values)
    if secret >> (8 * SECRET_BYTES):
        raise _unusable("shares of one secret", "shares that do not fit together")
    return secret.to_bytes(SECRET_BYTES, "big")


def evaluate(secret: int, threshold: int, points: Sequence[int], entropy: Entropy, prime: int = PRIME) -> list[int]:
    """At each of `points` a random polynomial of degree `threshold` − 1 whose value at 0 is `secret`."""
    coefficients = [secret, *(below(entropy, prime) for _ in range(threshold - 1))]
    found = []
    for point in points:
        value = 0
        for coefficient in reversed(coefficients):
            value = (value * point + coefficient) % prime
        found.append(value)
    return found


def interpolate(points: tuple[int, ...], values: Sequence[int], prime: int = PRIME) -> int:
    """The value at 0 of the polynomial of least degree that has `values` at `points`, which all differ."""
    weights = _weights_at_zero(points, prime)
    return sum(weight * value for weight, value in zip(weights, values, strict=True)) % prime


@lru_cache(maxsize=64)
def _weights_at_zero(points: tuple[int, ...], prime: int) -> tuple[int, ...]:
    """Lagrange's weights; where all hold shares of all, the same ones serve every secret of a round."""
    found = []
    for point in points:
        above, under = 1, 1
        for other in points:
            if other != point:
                above, under = above * other % prime, under * (other - point) % prime
        found.append(above * pow(under, -1, prime) % prime)
    return tuple(found)


def _unusable(expected: str, found: str) -> FederationError:
    return FederationError(sentence("shares", expected=expected, found=found, remedy="run the round again"))
