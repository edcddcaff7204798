"""What goes down to a node: as much of the adapter, of the residual and of the control variate as it lacks.

A node of smaller rank is sent the leading rows and columns. What never changes, and what stays with the node, is
sent once; of the residual beside the base, only the columns since it was last heard of; and of layers that take turns,
those that have had a turn since then.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import numpy as np

from fedpeft import residuals
from fedpeft.adapters import AdapterSpec, AdapterState, Tensors, at_rank, greatest_rank, resized
from fedpeft.codecs import as_sent, dense, moved
from fedpeft.errors import PacketError, sentence
from fedpeft.first_adapters import BUILT, built, fingerprint, untrained
from fedpeft.request_fields import (
    columns_between,
    epoch_of,
    held_round,
    rank_of,
    ranks_of,
    round_of,
    since_of,
    written,
)
from fedpeft.residuals import Ranks
from fedpeft.strategy import Strategy
from fedpeft.updates import Memory, ServerState
from fedpeft.wire import Packet, Scalar, Session

CONSTANT, RESIDUAL, SENT, HELD = "constant/", "residual/", "sent/", "held/"
"""What a memory's keys begin with where it keeps what never changes, the residual, what was sent last, and layers that
take turns."""

_EXACT = dense()
"""What goes down travels as it is, but for deltas: the residual is part of the base, and no codec may change that."""


@dataclass(frozen=True)
class Received:
    """What a client has after reading a request: the adapter at its rank, the control variate, and its memory."""

    adapter: AdapterState
    control: Tensors
    memory: Memory


def fit_request(
    strategy: Strategy, state: ServerState, session: Session, partition: int, rank: int = 0, *, whole: bool = False
) -> Packet:
    """The packet that asks a client of rank `rank` (0: the server's) to train from `state` in the round after it.

    With `whole` it counts on nothing that the client could build for itself.
    """
    return _request("fit", session.manifest(state.round + 1), strategy, state, partition, rank, whole=whole)


def evaluate_request(strategy: Strategy, state: ServerState, session: Session, partition: int, rank: int = 0) -> Packet:
    """The packet that asks a client to score `state`'s adapter, at its rank, on its own rows."""
    return _request("evaluate", session.manifest(state.round), strategy, state, partition, rank)


def describe_request(state: ServerState, session: Session) -> Packet:
    """The packet that asks a node for its rank and its memory before the round after `state`."""
    return Packet("describe", session.manifest(state.round + 1))


def read_request(
    packet: Packet, strategy: Strategy, spec: AdapterSpec, memory: Memory, build: Callable[[], AdapterState]
) -> Received:
    """What a fit or evaluate request brings, joined with what the client has; `spec` is at the server's rank.

    `build()` is the adapter as it is before any training.

    Raises:
        PacketError: the request counts on something that the client does not have, or is malformed.
        AdapterError: numbers that are not finite.
    """
    own = at_rank(spec, rank_of(packet, spec))
    known = packet.manifest.get("known") is True
    since, upto = since_of(packet), round_of(packet)
    wanted = _travelling(strategy, own, known=known, still=_still(strategy, own, since, upto))
    travelling, at_home = _divided(strategy, wanted, upto, apart=strategy.builds and BUILT in packet.manifest)
    start, end = (ranks_of(packet, key) for key in ("residual.from", "residual.to"))
    columns = residuals.specification(spec, columns_between(end, start, spec)) if end else None
    control = strategy.stage.shared(own, int(packet.manifest["round"])) if strategy.controls else None
    body, place = packet.body, f"{packet.kind} request"
    beside = sum(_EXACT.size(part) for part in (columns, control) if part)
    held = held_round(packet)
    if held is None and _EXACT.size(travelling) + beside != len(body):
        expected = f"{_EXACT.size(travelling) + beside} bytes"
        raise PacketError(sentence(place, expected=expected, found=len(body), remedy="use the same adapter settings"))
    at = max(len(body) - beside, 0)
    if held is None:
        tensors = _EXACT.decode(body[:at], travelling)
    else:
        tensors = moved(strategy.downlink, _last(packet, memory, travelling, held), body[:at], travelling)
    travelling.require(tensors, place)
    if at_home.shapes:
        tensors = {**tensors, **built(packet, build(), at_home)}
    residual = {}
    if columns:
        more = _EXACT.decode(body[at : at + _EXACT.size(columns)], columns)
        columns.require(more, f"{place}, residual")
        residual = residuals.joined(_held(packet, memory, start), start, more)
        at += _EXACT.size(columns)
    variate = _EXACT.decode(body[at:], control) if control else {}
    if control:
        control.require(variate, f"{place}, control variate")
    kept = _remembered(strategy, own, tensors, memory, known=known)
    if not strategy.downlink.additive:
        last = {f"{SENT}{key}": tensors[key] for key in strategy.travelling(own).shapes}
        kept = Memory({**kept.tensors, **last}, {**kept.fields, "sent": round_of(packet)})
    tensors = {**_waiting(strategy, own, since, upto, memory), **tensors}
    if strategy.stage.turns > 1:
        waiting = {f"{HELD}{key}": value for key, value in tensors.items()}
        kept = Memory({**_without(kept.tensors, HELD), **waiting}, {**kept.fields, "held": upto})
    adapter = {**tensors, **_constants(strategy, own, kept, place, known=known)}
    adapter |= _own(strategy, own, kept, int(packet.manifest["round"]))
    if columns:
        field = {"epoch": epoch_of(packet), "ranks": list(end)}
        kept = Memory(
            {**_without(kept.tensors, RESIDUAL), **{f"{RESIDUAL}{key}": value for key, value in residual.items()}},
            {**kept.fields, "residual": field},
        )
    own.require(adapter, place)
    return Received(AdapterState(own, adapter, residual), variate, kept)


def _request(
    kind: str,
    manifest: Mapping[str, Scalar],
    strategy: Strategy,
    state: ServerState,
    partition: int,
    rank: int,
    *,
    whole: bool = False,
) -> Packet:
    spec = at_rank(state.adapter.spec, rank)
    holding = state.holdings.get(partition)
    known = holding is not None and holding.rank >= greatest_rank(spec)
    since = holding.round if holding and known and strategy.stage.turns > 1 else None
    wanted = _travelling(strategy, spec, known=known, still=_still(strategy, spec, since, state.round))
    apart = strategy.builds and not (known or whole or partition in state.conduct)
    travelling, at_home = _divided(strategy, wanted, state.round, apart=apart)
    holds_last = known and holding is not None and holding.round == state.round - 1 and state.sent.delta != b""
    body = [state.sent.delta if holds_last else _EXACT.encode(resized(as_sent(state).tensors, travelling), travelling)]
    fields: dict[str, Scalar] = {**manifest, "rank": greatest_rank(spec), "known": known}
    fields |= {} if since is None else {"since": since}
    fields |= {BUILT: fingerprint(state.adapter.tensors, at_home)} if at_home.shapes else {}
    if holds_last:
        fields["held"] = state.round - 1
    if state.adapter.residual:
        end = residuals.ranks_of(state.adapter.residual)
        start = state.drift.ranks.get(holding.round, ()) if holding else ()
        start = start or (0,) * len(end)
        columns = residuals.specification(state.adapter.spec, columns_between(end, start, state.adapter.spec))
        body.append(_EXACT.encode(residuals.after(state.adapter.residual, start), columns))
        fields |= {"residual.from": written(start), "residual.to": written(end)}
        fields["residual.epoch"] = state.drift.epoch
    if strategy.controls:
        shared = strategy.stage.shared(spec, int(manifest["round"]))
        body.append(_EXACT.encode(resized(state.control, shared), shared))
    return Packet(kind, fields, b"".join(body))


def _travelling(strategy: Strategy, spec: AdapterSpec, *, known: bool, still: Collection[str]) -> AdapterSpec:
    """What of the adapter goes down: all of it to a node that is not known to have anything."""
    if not known:
        return spec
    changed = strategy.travelling(spec)
    return changed.only(key for key in changed.shapes if key not in still)


def _divided(strategy: Strategy, wanted: AdapterSpec, round_: int, *, apart: bool) -> tuple[AdapterSpec, AdapterSpec]:
    """What of `wanted` travels after round `round_`, and what a node can build for itself, where they are `apart`."""
    at_home = wanted.only(untrained(strategy, wanted, round_).shapes if apart else ())
    return wanted.only(key for key in wanted.shapes if key not in at_home.shapes), at_home


def _still(strategy: Strategy, spec: AdapterSpec, since: int | None, upto: int) -> frozenset[str]:
    """The tensors that no round after `since` up to `upto` has changed; none where nothing is known (None)."""
    if since is None:
        return frozenset()
    rounds = range(since + 1, min(upto, since + strategy.stage.period) + 1)
    changed = {key for round_ in rounds for key in strategy.stage.shared(spec, round_).shapes}
    return frozenset(spec.shapes) - changed


def _waiting(
    strategy: Strategy, spec: AdapterSpec, since: int | None, upto: int, memory: Memory
) -> dict[str, np.ndarray]:
    """The tensors that did not change since the node was last heard of, out of its memory.

    Raises:
        PacketError: the request counts on another round than that of which the node has them.
    """
    kept = {*strategy.stage.constant(spec), *strategy.stage.local(spec, 1)}
    wanted = [key for key in _still(strategy, spec, since, upto) if key not in kept]
    found = {key: memory.tensors[f"{HELD}{key}"] for key in wanted if f"{HELD}{key}" in memory.tensors}
    if since is not None and (memory.fields.get("held") != since or len(found) < len(wanted)):
        raise PacketError(
            sentence(
                "request, layers that take turns",
                expected=f"those of round {since} in this node's memory",
                found=f"those of round {memory.fields.get('held')}",
                remedy="ask again; all of them will be sent",
            )
        )
    return found


def _remembered(strategy: Strategy, spec: AdapterSpec, tensors: Tensors, memory: Memory, *, known: bool) -> Memory:
    """The memory with what never changes, where the request brought it."""
    if known:
        return memory
    constants = {f"{CONSTANT}{key}": tensors[key] for key in strategy.stage.constant(spec)}
    return Memory({**memory.tensors, **constants}, memory.fields)


def _constants(strategy: Strategy, spec: AdapterSpec, memory: Memory, place: str, *, known: bool) -> Tensors:
    """What never changes, out of the memory, where the request counts on it."""
    if not known:
        return {}
    wanted = spec.only((*strategy.stage.constant(spec), *strategy.stage.local(spec, 1)))
    held = {key: memory.tensors.get(f"{CONSTANT}{key}", memory.tensors.get(key)) for key in wanted.shapes}
    found = {key: value for key, value in held.items() if value is not None}
    if len(found) < len(held):
        lost = next(key for key, value in held.items() if value is None)
        raise PacketError(
            sentence(place, expected=f"{lost} in this node's memory", found="none", remedy="ask again; it will be sent")
        )
    return resized(found, wanted)


def _own(strategy: Strategy, spec: AdapterSpec, memory: Memory, round_: int) -> Tensors:
    """The tensors that are this client's own, at the rank it has now."""
    mine = spec.only(key for key in strategy.stage.local(spec, round_) if key in memory.tensors)
    return resized(memory.tensors, mine)


def _held(packet: Packet, memory: Memory, start: Ranks) -> Tensors:
    """The residual as far as the client has it.

    Raises:
        PacketError: the request counts on more columns than there are.
    """
    fields = memory.fields.get("residual", {})
    ranks, epoch = tuple(fields.get("ranks", ())), packet.manifest.get("residual.epoch")
    enough = len(ranks) == len(start) and all(have >= want for have, want in zip(ranks, start, strict=True))
    if any(start) and not (enough and fields.get("epoch") == epoch):
        raise PacketError(
            sentence(
                f"{packet.kind} request, residual",
                expected=f"ranks {written(start)[:60]} of epoch {epoch} in this node's memory",
                found=f"{written(ranks)[:60] or 'none'} of epoch {fields.get('epoch')}",
                remedy="ask again; all of it will be sent",
            )
        )
    found = {key.removeprefix(RESIDUAL): value for key, value in memory.tensors.items() if key.startswith(RESIDUAL)}
    return found


def _last(packet: Packet, memory: Memory, spec: AdapterSpec, held: int) -> Tensors:
    """The tensors of `spec` that the client was sent last.

    Raises:
        PacketError: they are not those of after round `held`.
    """
    found = {key: memory.tensors[f"{SENT}{key}"] for key in spec.shapes if f"{SENT}{key}" in memory.tensors}
    if memory.fields.get("sent") != held or len(found) < len(spec.shapes):
        raise PacketError(
            sentence(
                f"{packet.kind} request",
                expected=f"the adapter after round {held} in this node's memory",
                found=f"that after {memory.fields['sent']}" if "sent" in memory.fields else "none",
                remedy="ask again; it will be sent",
            )
        )
    return resized(found, spec)


def _without(tensors: Tensors, prefix: str) -> Tensors:
    return {key: value for key, value in tensors.items() if not key.startswith(prefix)}
