"""What server and clients of one secure sum agree on before it begins."""

from __future__ import annotations

import hashlib
import re
import struct
from dataclasses import dataclass

from fedpeft.errors import ConfigError, sentence

MOST_CLIENTS = 100_000
"""The most clients of one sum."""

MOST_DEGREE = 2048
"""The most neighbours that a client chooses."""

MOST_VALUES = 2**31
"""The most integers of one input."""

MOST_WIDTH = 62
"""The most bits of an integer of the sum."""

_RUN = re.compile(r"[a-z0-9_-]{1,64}", re.ASCII)
_FIELDS = struct.Struct(">64sIIIIIBB")
_TALLY_BITS = 64


@dataclass(frozen=True)
class Terms:
    """One secure sum of `length` integers modulo 2^`width`.

    `round` never comes twice in a run: an attempt that is made again takes a new number. `clients` are invited.
    Each masks its input with `degree` neighbours that it chooses (or all, where there are no more), and those and
    itself hold the shares of its secrets, of which `threshold` open one. `signed`: by node keys.

    Raises:
        ConfigError: a field is out of its range.
    """

    run: str
    round: int
    clients: int
    degree: int
    threshold: int
    length: int
    width: int
    signed: bool = True

    def __post_init__(self) -> None:
        if not _RUN.fullmatch(self.run):
            raise _unusable("run", "1 to 64 of a-z, 0-9, _ and -", ascii(self.run[:80]))
        ranges = {
            "round": (0, 2**31 - 1),
            "clients": (2, MOST_CLIENTS),
            "degree": (1, min(self.clients - 1, MOST_DEGREE)),
            "threshold": (2, self.degree + 1),
            "length": (1, MOST_VALUES),
            "width": (2, MOST_WIDTH),
        }
        for name, (least, most) in ranges.items():
            if not least <= getattr(self, name) <= most:
                raise _unusable(name, f"from {least} to {most}", str(getattr(self, name)))

    @property
    def tally(self) -> int:
        """How many words at the end of an input are 1, so that their sums say how many inputs there are."""
        return -(-_TALLY_BITS // self.width)

    @property
    def words(self) -> int:
        """How many integers a masked input has, those of the tally included."""
        return self.length + self.tally

    @property
    def session(self) -> bytes:
        """32 bytes that every message, key and signature of this sum is bound to."""
        return hashlib.sha256(b"fedpeft secure sum 1" + encode(self)).digest()


def width_for(clients: int, magnitude: int) -> int:
    """The fewest bits in which a sum of `clients` integers from −`magnitude` to `magnitude` cannot wrap around."""
    return max((2 * clients * magnitude).bit_length(), 2)


def encode(terms: Terms) -> bytes:
    """The terms as bytes; the same terms give the same bytes."""
    return _FIELDS.pack(
        terms.run.encode().ljust(64, b"\0"),
        terms.round,
        terms.clients,
        terms.degree,
        terms.threshold,
        terms.length,
        terms.width,
        terms.signed,
    )


def decode(data: bytes) -> Terms:
    """The terms in bytes that `encode` made.

    Raises:
        ConfigError: another size, or a field out of its range.
    """
    if len(data) != _FIELDS.size:
        raise _unusable("terms", f"{_FIELDS.size} bytes", str(len(data)))
    run, round_, clients, degree, threshold, length, width, signed = _FIELDS.unpack(data)
    name = run.rstrip(b"\0").decode("latin-1")
    return Terms(name, round_, clients, degree, threshold, length, width, bool(signed))


def _unusable(name: str, expected: str, found: str) -> ConfigError:
    remedy = "run the same version and settings on both sides"
    return ConfigError(sentence(f"secure sum, {name}", expected=expected, found=found, remedy=remedy))
