"""What the fields of a request say, each checked before it is believed."""

from __future__ import annotations

import re

from fedpeft import residuals
from fedpeft.adapters import AdapterSpec, greatest_rank
from fedpeft.errors import PacketError, sentence
from fedpeft.residuals import Ranks
from fedpeft.wire import Packet, shown

_RANKS = re.compile(r"(\d{1,20}(,\d{1,20})*)?", re.ASCII)


def since_of(packet: Packet) -> int | None:
    """After which round the server last heard of this node; None where it does not count on that.

    Raises:
        PacketError: it is none that has been.
    """
    since, round_ = packet.manifest.get("since"), int(packet.manifest["round"])
    if since is not None and (isinstance(since, bool) or not isinstance(since, int) or not 0 <= since <= round_):
        raise PacketError(
            sentence(
                f"{packet.kind} request, since",
                expected=f"an integer from 0 to {round_}",
                found=shown(since),
                remedy="run the same version on both sides",
            )
        )
    return since


def round_of(packet: Packet) -> int:
    """After which round the adapter is that a request brings."""
    return int(packet.manifest["round"]) - (packet.kind == "fit")


def held_round(packet: Packet) -> int | None:
    """After which round the adapter is that a request moves by a delta; None where it brings all of one.

    Raises:
        PacketError: it is not that of the round before.
    """
    held = packet.manifest.get("held")
    if held is None:
        return None
    if isinstance(held, bool) or not isinstance(held, int) or held != round_of(packet) - 1:
        raise PacketError(
            sentence(
                f"{packet.kind} request, held",
                expected=f"{round_of(packet) - 1}, the round before",
                found=shown(held),
                remedy="run the same version on both sides",
            )
        )
    return held


def rank_of(packet: Packet, spec: AdapterSpec) -> int:
    """The rank that the client is asked for, of a server's adapter of `spec`.

    Raises:
        PacketError: it is none that there can be.
    """
    rank, most = packet.manifest.get("rank", 0), greatest_rank(spec)
    if isinstance(rank, bool) or not isinstance(rank, int) or not min(1, most) <= rank <= most:
        raise PacketError(
            sentence(
                f"{packet.kind} request, rank",
                expected=f"an integer from {min(1, most)} to {most}",
                found=shown(rank),
                remedy="use the same adapter settings on both sides",
            )
        )
    return rank


def ranks_of(packet: Packet, key: str) -> Ranks:
    """How many columns of the residual each module has, by the field `key`; none where there is no such field.

    Raises:
        PacketError: it is no list of integers.
    """
    text = packet.manifest.get(key, "")
    if not isinstance(text, str) or not _RANKS.fullmatch(text):
        raise PacketError(
            sentence(
                f"{packet.kind} request, {key}",
                expected="integers with commas between",
                found=shown(text),
                remedy="run the same version on both sides",
            )
        )
    return tuple(int(item) for item in text.split(",") if item)


def epoch_of(packet: Packet) -> int:
    """Which rewriting of the residual the request counts on.

    Raises:
        PacketError: it does not say.
    """
    epoch = packet.manifest.get("residual.epoch")
    if isinstance(epoch, bool) or not isinstance(epoch, int) or epoch < 0:
        raise PacketError(
            sentence(
                f"{packet.kind} request, residual.epoch",
                expected="an integer from 0",
                found=shown(epoch),
                remedy="run the same version on both sides",
            )
        )
    return epoch


def columns_between(end: Ranks, start: Ranks, spec: AdapterSpec) -> Ranks:
    """How many columns each module is sent.

    Raises:
        PacketError: the two do not go together.
    """
    begun = start or (0,) * len(end)
    modules = len(residuals.specification(spec, ()).shapes) // 2
    if not len(begun) == len(end) == modules or any(
        low < 0 or high < low for low, high in zip(begun, end, strict=True)
    ):
        raise PacketError(
            sentence(
                "request, residual",
                expected="ranks from and to of the same modules",
                found=f"{written(start)[:60]} and {written(end)[:60]}",
                remedy="run the same version on both sides",
            )
        )
    return tuple(high - low for low, high in zip(begun, end, strict=True))


def written(ranks: Ranks) -> str:
    """The ranks as a field says them."""
    return ",".join(map(str, ranks))
