"""The server in a secure sum: the usable updates of a round are one, the mean of all that came.

Where products are summed, there are two sums over the same clients: of sketches, and of products projected.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from fedpeft.adapters import Tensors
from fedpeft.codecs import as_sent, dense
from fedpeft.errors import FedPeftError, PlanError, QuorumError, sentence
from fedpeft.gathering import Round, client_record, drawn_for, excuse_in, failed, requests_of, timed
from fedpeft.merges.passes import Passes, bases_of, joined
from fedpeft.privacy.channel import Channel, as_mean, coordinates
from fedpeft.privacy.secure import messages, server
from fedpeft.privacy.secure.keys import OPEN, Registry
from fedpeft.privacy.secure.policy import terms_for
from fedpeft.privacy.secure.server import Outbox, ServerState, Sum
from fedpeft.privacy.secure.terms import Terms
from fedpeft.quarantine import REFUSED
from fedpeft.secure_client import AGAIN, INVITATION_FIELD, PHASE_FIELD, ROOM
from fedpeft.strategy import sent
from fedpeft.updates import Update
from fedpeft.wire import Failure, Packet, read_figures, require_examples, require_manifest

_logger = logging.getLogger(__name__)

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
    adapter = one.state.adapter
    shared, passes = one.strategy.stage.shared(adapter.spec, one.number), one.strategy.passes(adapter.spec, one.number)
    told: dict[int, _Told] = {}
    requests = requests_of(one, drawn)
    if passes is None:
        found = _opened(one, channel, requests, "keys", shared.parameters, told)
        sides = coordinates(channel, adapter.spec, adapter.tensors, shared)
        update = Update(shared, as_mean(channel, found.total, len(found.survivors), shared, sides), 0, 0)
    else:
        roomy = channel.roomier(ROOM)
        found = _opened(one, roomy, requests, "keys", passes.first.parameters, told)
        update = _in_two(one, passes, as_mean(roomy, found.total, len(found.survivors), passes.first, {}), found, told)
    present = {partition: told[partition] for partition in found.survivors}
    one.seen.said |= {partition: client.sent for partition, client in told.items() if partition not in present}
    for partition, client in present.items():
        record = client_record(partition, client.reply, client.update)
        one.seen.clients.append({**record, "bytes_up": client.sent})
        one.heard(one.number, partition, True)
    examples = sum(client.update.examples for client in present.values())
    tokens = sum(client.update.tokens for client in present.values())
    yield replace(update, examples=examples, tokens=tokens, count=len(present))


def _in_two(one: Round, passes: Passes, mean: Tensors, first: Sum, told: dict[int, _Told]) -> Update:
    """The mean of products and of all else, of which `mean` is that of the first sum.

    Where not all of the first sum are in the second, nobody's products are: the difference would show somebody's. Then
    products stay as they are, and how much of the mean that lacks nobody knows.
    """
    channel, before = one.strategy.channel, as_sent(one.state)
    bases = bases_of(passes, mean)
    asked = Packet("secure", one.session.manifest(one.number), dense().encode(bases, passes.bases))
    try:
        if channel is None:
            raise QuorumError("secure sum: expected a channel, found none; a bug.")
        requests = dict.fromkeys(first.survivors, replace(asked, manifest={**asked.manifest, PHASE_FIELD: AGAIN}))
        one.seen.sends(requests)
        second = _opened(one, channel, requests, AGAIN, passes.second.parameters, told, among=first.survivors)
    except (PlanError, QuorumError) as error:
        _logger.warning("round %d: products are left as they are, because %s", one.number, error)
        same = sent(before, passes.shared)
        none = {key: np.zeros(shape, np.float32) for key, shape in passes.shared.shapes.items()}
        beside = {key: np.asarray(mean[key], np.float32) for key in mean if key in none}
        return Update(same.spec.only(none), {**none, **beside}, 0, 0, lacks=dict.fromkeys(passes.paths, math.nan))
    projected = as_mean(channel, second.total, len(second.survivors), passes.second, {})
    found, lacks = joined(passes, mean, bases, projected)
    was = sent(before, found.spec).tensors
    moved = {f"{path}.{name}" for path in passes.paths for name in "AB"}
    delta = {key: value - was[key] if key in moved else value for key, value in found.tensors.items()}
    return Update(found.spec, delta, 0, 0, lacks=lacks)


def _opened(
    one: Round,
    channel: Channel,
    requests: Mapping[int, Packet],
    phase: str,
    length: int,
    told: dict[int, _Told],
    among: tuple[int, ...] = (),
) -> Sum:
    """The sum of so many integers, to which `requests` invite; it begins with `phase`.

    Raises:
        QuorumError: too few go through with it, or not all those it must be `among`.
    """
    attempt = _attempt()
    try:
        terms = _terms(one, channel, attempt, len(requests), length)
    except PlanError:
        if not among:
            raise
        tolerant = replace(channel, dropout=1 / len(requests))  # all must be in it; one may be gone when it is opened
        terms = _terms(one, tolerant, attempt, len(requests), length)
    invitation = messages.invitation(terms).hex()
    invited = {p: replace(r, manifest={**r.manifest, INVITATION_FIELD: invitation}) for p, r in requests.items()}
    state, outbox = server.gather_keys(terms, _registry(channel), set(invited), _replies(one, invited, phase, told))
    for phase_, gather in _PHASES:
        if among and set(outbox) != set(among):
            found, remedy = f"{len(outbox)}", "see why the others fell silent"
            expected = f"all {len(among)} of the first sum of the round in the second one too"
            raise QuorumError(sentence("secure sum", expected=expected, found=found, remedy=remedy))
        state, outbox = gather(state, _asked(one, phase_, outbox, told))
    found_ = server.open_sum(state, _asked(one, "opening", outbox, told))
    for partition, reason in found_.refused:
        failed(one, partition, Failure(reason, REFUSED))
    return found_


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
