"""The server in a secure sum: the usable updates of a round are one, the mean of all that came."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

from fedpeft.errors import FedPeftError
from fedpeft.gathering import Round, client_record, drawn_for, excuse_in, failed, requests_of, timed
from fedpeft.privacy.channel import Channel, as_mean, coordinates
from fedpeft.privacy.secure import messages, server
from fedpeft.privacy.secure.keys import OPEN, Registry
from fedpeft.privacy.secure.policy import terms_for
from fedpeft.privacy.secure.server import Outbox, ServerState
from fedpeft.privacy.secure.terms import Terms
from fedpeft.quarantine import REFUSED
from fedpeft.secure_client import INVITATION_FIELD, PHASE_FIELD
from fedpeft.updates import Update
from fedpeft.wire import Failure, Packet, read_figures, require_examples, require_manifest

_EPOCH_SECONDS = 1_767_225_600
"""2026-01-01. Attempts are numbered by ticks since then, so that none is numbered twice, whoever dies meanwhile."""

_TICKS = 8
"""A second has so many; the numbers last until 2034."""

_PHASES: tuple[tuple[str, Callable[..., tuple[ServerState, Outbox]]], ...] = (
    ("shares", server.gather_shares),
    ("input", server.gather_inputs),
    ("confirmation", server.gather_confirmations),
)
"""What clients are asked for after their keys, and what the server makes of the answers; openings come last."""


@dataclass
class _Told:
    """What one client has said beside its update, and the bytes that it has sent so far."""

    reply: Packet
    update: Update
    sent: int = 0


def summed(one: Round) -> Iterator[Update]:
    """The mean of the round's updates, each clipped, as one update; the server has seen none of them.

    What clients say beside it is on record for those whose updates are in the sum. Nothing where nobody was drawn.

    Raises:
        QuorumError: fewer answer than the sum needs.
        PlanError: fewer are reachable than it can be safe with.
    """
    channel, drawn = one.strategy.channel, drawn_for(one, ())
    if channel is None or not drawn:
        return
    shared = one.strategy.stage.shared(one.state.adapter.spec, one.number)
    attempt = _attempt()
    terms = _terms(one, channel, attempt, len(drawn), shared.parameters)
    invitation = messages.invitation(terms).hex()
    requests = {
        partition: replace(request, manifest={**request.manifest, INVITATION_FIELD: invitation})
        for partition, request in requests_of(one, drawn).items()
    }
    told: dict[int, _Told] = {}
    state, outbox = server.gather_keys(terms, _registry(channel), set(requests), _replies(one, requests, "keys", told))
    for phase, gather in _PHASES:
        state, outbox = gather(state, _asked(one, phase, outbox, told))
    found = server.open_sum(state, _asked(one, "opening", outbox, told))
    for partition, reason in found.refused:
        failed(one, partition, Failure(reason, REFUSED))
    present = {partition: told[partition] for partition in found.survivors}
    one.seen.said |= {partition: client.sent for partition, client in told.items() if partition not in present}
    for partition, client in present.items():
        record = client_record(partition, client.reply, client.update)
        one.seen.clients.append({**record, "bytes_up": client.sent})
        one.heard(one.number, partition, True)
    adapter = one.state.adapter
    sides = coordinates(channel, adapter.spec, adapter.tensors, shared)
    mean = as_mean(channel, found.total, len(present), shared, sides)
    examples = sum(client.update.examples for client in present.values())
    tokens = sum(client.update.tokens for client in present.values())
    yield Update(shared, mean, examples, tokens, count=len(present))


def _registry(channel: Channel) -> Registry:
    """Whose signatures the server takes: it passes them on, and the clients see whether they are right."""
    return Registry(True, lambda partition, message, signature: True) if channel.signed else OPEN  # noqa: ARG005


def _attempt() -> int:
    """The tick that begins next: whoever began before, even in this moment, was numbered below it."""
    now = found = _tick()
    while found == now:
        time.sleep(0.1 / _TICKS)
        found = _tick()
    return found


def _tick() -> int:
    return int((time.time() - _EPOCH_SECONDS) * _TICKS)


def _terms(one: Round, channel: Channel, attempt: int, clients: int, length: int) -> Terms:
    width, run = channel.width(clients, length), one.session.run
    return terms_for(channel.policy, run, attempt, clients, length, width, channel.dropout, signed=channel.signed)


def _asked(one: Round, phase: str, outbox: Outbox, told: dict[int, _Told]) -> Iterator[tuple[int, bytes]]:
    manifest = {**one.session.manifest(one.number), PHASE_FIELD: phase}
    requests = {partition: Packet("secure", manifest, body) for partition, body in outbox.items()}
    one.seen.sends(requests)
    return _replies(one, requests, phase, told)


def _replies(
    one: Round, requests: Mapping[int, Packet], phase: str, told: dict[int, _Told]
) -> Iterator[tuple[int, bytes]]:
    """The bodies of the usable replies; every other is a failure on record. The first one's figures go to `told`."""
    open_ = dict.fromkeys(requests)
    for partition, reply in timed(one, requests):
        if partition not in open_:
            continue
        del open_[partition]
        failure = excuse_in(reply)
        try:
            if failure is None and isinstance(reply, Packet):
                expected = {**one.session.manifest(one.number), "partition": partition, PHASE_FIELD: phase}
                require_manifest(reply, "secured", expected)
                if partition not in told:
                    told[partition] = _Told(reply, _bounded(one, partition, read_figures(reply, expected)))
                told[partition].sent += reply.size_bytes
                yield partition, reply.body
        except FedPeftError as error:
            failure = Failure(str(error), REFUSED)
        if failure is not None:
            failed(one, partition, failure)


def _bounded(one: Round, partition: int, update: Update) -> Update:
    require_examples(update, one.asking.most_examples, f"update of partition {partition}")
    return update
