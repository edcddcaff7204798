"""Which rank each node trains at: told by a list, by the node itself, or by what memory the node has."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from fedpeft.wire import Packet, Scalar

Said = Mapping[str, Scalar]


class RankRule(NamedTuple):
    """How nodes come by their ranks.

    `rank(partition, said)` is that of a node which says `said` of itself (nothing, where `asks` is false);
    0 is the server's. `possible` are all the ranks that the rule may give.
    """

    asks: bool
    rank: Callable[[int, Said], int]
    possible: tuple[int, ...]


def equal() -> RankRule:
    """Every node trains at the server's rank."""
    return RankRule(False, lambda partition, said: 0, (0,))  # noqa: ARG005


def listed(ranks: tuple[int, ...]) -> RankRule:
    """Partition p trains at the p-th of `ranks`, counted round and round."""
    return RankRule(False, lambda partition, said: ranks[partition % len(ranks)], ranks)  # noqa: ARG005


def declared(default: int) -> RankRule:
    """Every node says its own rank before each round, and may say another than the last time.

    One that says none trains at `default`.
    """

    def rank(partition: int, said: Said) -> int:  # noqa: ARG001
        return _integer(said, "rank") or default

    return RankRule(True, rank, tuple(range(1, default + 1)))


def by_memory(ranks: tuple[int, ...], gigabytes: tuple[float, ...]) -> RankRule:
    """A node trains at the last of `ranks` whose `gigabytes` it has; one with less than the first, at the first."""

    def rank(partition: int, said: Said) -> int:  # noqa: ARG001
        held = _integer(said, "memory_bytes")
        fitting = [rank for rank, needed in zip(ranks, gigabytes, strict=True) if needed * 1e9 <= held]
        wanted = fitting[-1] if fitting else ranks[0]
        return min(wanted, _integer(said, "rank") or wanted)

    return RankRule(True, rank, tuple(range(1, max(ranks) + 1)))


def said_in(packet: Packet) -> Said:
    """What a node's description says of it."""
    return {key: packet.manifest.get(key, 0) for key in ("rank", "memory_bytes")}


def _integer(said: Said, key: str) -> int:
    value = said.get(key, 0)
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0
