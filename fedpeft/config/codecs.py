"""Settings of codecs: how many numbers of an update travel, in how many bits each, and what becomes of the rest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from fedpeft.codecs import ROUNDINGS, Codec, bf16, coded, dense, low_rank, steps, top_k, zstd
from fedpeft.config.fields import Table, require, require_range
from fedpeft.errors import PlanError, sentence

HEAD_LEVELS = (255, 15, 4, 3)
"""How many steps a number of a head may have: those of `Int8`, `Int4`, `Int2` and `Ternary`."""


@dataclass(frozen=True)
class Dense:
    """Every number as it is, in float32."""

    def parts(self) -> Mapping[str, Any]:
        """What of a codec these settings decide, by name."""
        return {}

    def build(self) -> Codec:
        """The codec that these settings describe."""
        return Together((self,)).build()


@dataclass(frozen=True)
class Bf16(Dense):
    """Every number as the nearest bfloat16."""

    def parts(self) -> Mapping[str, Any]:
        """See Dense."""
        return {"rounding": bf16()}


@dataclass(frozen=True)
class Int8(Dense):
    """Blocks of `block` numbers, each in one of 255 equal steps; `rounding` is `stochastic` or `nearest`."""

    block: int = 64
    rounding: str = "stochastic"
    levels: ClassVar[int] = 255

    def __post_init__(self) -> None:
        _require_blocks(self)

    def parts(self) -> Mapping[str, Any]:
        """See Dense."""
        return {"rounding": steps(self.levels, self.block, self.rounding)}


@dataclass(frozen=True)
class Int4(Int8):
    """As `Int8`, in 15 steps."""

    levels: ClassVar[int] = 15


@dataclass(frozen=True)
class Int2(Int8):
    """As `Int8`, in four steps, of which none is 0."""

    levels: ClassVar[int] = 4


@dataclass(frozen=True)
class Ternary(Int8):
    """As `Int8`, in three steps: the greatest magnitude of the block, its negative, and 0."""

    levels: ClassVar[int] = 3


@dataclass(frozen=True)
class TopK(Dense):
    """The greatest `share` of the numbers by magnitude; the others count as 0."""

    share: float = 0.1

    def __post_init__(self) -> None:
        holds = 0 < self.share <= 1
        require(holds, "share", expected="a number above 0 and of at most 1", found=self.share)

    def parts(self) -> Mapping[str, Any]:
        """See Dense."""
        return {"reduction": top_k(self.share)}


@dataclass(frozen=True)
class LowRank(Dense):
    """Each matrix as the nearest one of `rank`, in two factors, where those are fewer numbers."""

    rank: int = 2

    def __post_init__(self) -> None:
        require_range(self, "rank", 1)

    def parts(self) -> Mapping[str, Any]:
        """See Dense."""
        return {"reduction": low_rank(self.rank)}


@dataclass(frozen=True)
class Zstd(Dense):
    """The bytes as a frame of Zstandard, of compression level `level`."""

    level: int = 3

    def __post_init__(self) -> None:
        require_range(self, "level", 1, 19)

    def parts(self) -> Mapping[str, Any]:
        """See Dense."""
        return {"entropy": zstd(self.level)}


@dataclass(frozen=True)
class Heads(Dense):
    """What is trained whole beside an adapter is rounded too: blocks of `block` numbers, each in one of `levels`."""

    levels: int = 255
    block: int = 64
    rounding: str = "stochastic"

    def __post_init__(self) -> None:
        known = ", ".join(map(str, HEAD_LEVELS))
        require(self.levels in HEAD_LEVELS, "levels", expected=f"one of {known}", found=self.levels)
        _require_blocks(self)

    def parts(self) -> Mapping[str, Any]:
        """See Dense."""
        return {"heads": steps(self.levels, self.block, self.rounding)}


@dataclass(frozen=True)
class ErrorFeedback(Dense):
    """A client adds to each update what the codec lost of those before.

    Source: Karimireddy et al. 2019, "Error Feedback Fixes SignSGD and other Gradient Compression Schemes".
    """

    def parts(self) -> Mapping[str, Any]:
        """See Dense."""
        return {"remembers": True}


@dataclass(frozen=True)
class Together:
    """Settings of several parts of one codec, such as `top_k+int4+error_feedback+zstd`, in any order."""

    members: tuple[Dense, ...]

    def build(self) -> Codec:
        """The codec that these settings describe.

        Raises:
            PlanError: two of them decide the same part.
        """
        found: dict[str, Any] = {}
        for member in self.members:
            for part, made in member.parts().items():
                if part in found:
                    raise PlanError(
                        sentence(
                            "aggregation.codec.kind, aggregation.downlink.kind",
                            expected=f"one {part} at most",
                            found="two",
                            remedy="drop one of them",
                        )
                    )
                found[part] = made
        return coded(**found) if found else dense()


CODECS = Table(
    "kind",
    {
        "dense": Dense,
        "bf16": Bf16,
        "int8": Int8,
        "int4": Int4,
        "int2": Int2,
        "ternary": Ternary,
        "top_k": TopK,
        "low_rank": LowRank,
        "heads": Heads,
        "zstd": Zstd,
        "error_feedback": ErrorFeedback,
    },
    together=Together,
)
"""The parts of codecs by name; several with + between make one codec."""


def _require_blocks(settings: Any) -> None:
    """Raises ConfigError for blocks or a rounding that there is none of."""
    require_range(settings, "block", 1, 65536)
    names = ", ".join(ROUNDINGS)
    require(settings.rounding in ROUNDINGS, "rounding", expected=f"one of {names}", found=settings.rounding)
