"""A client in a secure sum: its update stays with it, as integers, until it is sent under masks.

Where products are summed there are two sums, over the same clients: of two over unlike ones the difference would show
somebody's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from fedpeft.adapters import AdapterSpec, AdapterState, Factors
from fedpeft.codecs import dense
from fedpeft.errors import PacketError, RefusalError, sentence
from fedpeft.merges.passes import Passes, lend, project, require_bases
from fedpeft.privacy.channel import Channel, as_integers, coordinates
from fedpeft.privacy.secure import client as protocol
from fedpeft.privacy.secure.client_state import ClientState, Member, Phase, from_bytes, to_bytes
from fedpeft.privacy.secure.keys import OPEN, Registry, Sign, unsigned
from fedpeft.privacy.secure.messages import read_invitation
from fedpeft.privacy.secure.policy import Policy
from fedpeft.randomness import rng
from fedpeft.updates import Memory, Update
from fedpeft.wire import Packet, Scalar, shown

SECURE = "secure"
"""The field of a memory, and the beginning of its tensors' names, that a secure sum keeps there."""

PHASE_FIELD, INVITATION_FIELD = "phase", "invitation"

_EXACT = dense()

AGAIN = "again"
"""The phase with which the second of two sums begins."""

ROOM = 2.0
"""How much longer than what it is of a sketch may be: with 10 columns, one in 10⁵ is."""

_VALUES = f"{SECURE}/values"
_OPENED = f"{SECURE}.opened"
"""The field with the last round whose sum this client has helped to open."""

_PRODUCTS = f"{SECURE}/product/"
"""What keys begin with under which a client keeps what it lends to a second sum, until that is open."""

_TOGETHER = f"{SECURE}.together"
"""The field with the clients of the first sum, with whom alone the second may be."""


@dataclass(frozen=True)
class Identity:
    """How a node signs in secure sums, and whose signatures it takes: nobody's, where nodes have no keys."""

    sign: Sign = unsigned
    registry: Registry = OPEN


@dataclass(frozen=True)
class Party:
    """Who a client is in a secure sum: its partition, the run's channel, what its node asks for, and who it is."""

    partition: int
    channel: Channel | None
    least_cohort: int = 0
    identity: Identity = field(default_factory=Identity)


def joining(
    packet: Packet,
    update: Update,
    memory: Memory,
    party: Party,
    shared: AdapterSpec,
    adapter: AdapterState,
    manifest: Mapping[str, Scalar],
    passes: Passes | None = None,
) -> tuple[Packet, Memory]:
    """The reply to a fit request that invites to a secure sum: keys, and nothing of the update but its figures.

    The update is in the memory, as integers; `adapter` is what it was trained from, `shared` what travels, at the
    server's ranks. With `passes` those integers are a sketch, and what it is of is in the memory too.

    Raises:
        PacketError: there is no invitation, or it is malformed.
        RefusalError: the invitation asks for less than the client's policy, or this round's sum has been opened: the
            difference of two sums that hold the same update, of unlike clients, would show somebody's.
    """
    channel, opened = _channel(party), int(memory.fields.get(_OPENED, 0))
    if int(packet.manifest["round"]) <= opened:
        expected, found = f"a round after {opened}, whose sum is open", f"round {packet.manifest['round']} again"
        remedy = "begin a new run from the last adapter"
        raise RefusalError(sentence("fit request", expected=expected, found=found, remedy=remedy))
    invitation = _bytes(packet, INVITATION_FIELD)
    state, message = protocol.advertise(_member(party, channel), _state(memory), invitation)
    clients = read_invitation(invitation).clients
    draws = rng(channel.seed, int(packet.manifest["round"]), party.partition, "rounding").bytes
    made: dict[str, np.ndarray] = {}
    if passes is None:
        sides = coordinates(channel, adapter.spec, adapter.tensors, shared)
        values, size = as_integers(channel, update.delta, shared, sides, clients, draws)
    else:
        lent = lend(passes, update, adapter, channel.clip_norm)
        values, size = as_integers(channel.roomier(ROOM), lent.tensors, passes.first, {}, clients, draws)[0], lent.size
        made = {
            f"{_PRODUCTS}{path}.{name}": value for path, one in lent.products.items() for name, value in _named(one)
        }
    metrics = {**update.metrics, "update_norm": size}
    figures = {f"metric.{key}": float(value) for key, value in metrics.items()}
    counts = {"rank": 0, "examples": update.examples, "tokens": update.tokens}
    fields = {key: value for key, value in memory.fields.items() if key != _TOGETHER}
    kept = Memory({**_without_products(memory), _VALUES: values, **made}, fields)
    return Packet("secured", {**manifest, PHASE_FIELD: "keys", **counts, **figures}, message), _keeping(kept, state)


def answer_phase(
    packet: Packet, memory: Memory, party: Party, manifest: Mapping[str, Scalar], passes: Passes | None = None
) -> tuple[Packet, Memory]:
    """The reply in one of the later phases of a sum; after the last one the update is forgotten.

    Raises:
        PacketError: no such phase, or a malformed message.
        AdapterError: bases of a second sum that are none.
        RefusalError: what the server asks for would show more than a sum, or the client has nothing to send.
    """
    phase = packet.manifest.get(PHASE_FIELD)
    if phase == AGAIN and passes is not None:
        return _joining_again(packet, memory, party, manifest, passes)
    act = _PHASES.get(phase) if isinstance(phase, str) else None
    if act is None:
        known = ", ".join(_PHASES)
        remedy = "run the same version on both sides"
        place = "secure request, phase"
        raise PacketError(sentence(place, expected=f"one of {known}", found=shown(phase), remedy=remedy))
    values = memory.tensors.get(_VALUES)
    if values is None:
        expected, remedy = "an update of this round", "ask for training first"
        raise RefusalError(sentence("secure request", expected=expected, found="none", remedy=remedy))
    state, message = act(_member(party, _channel(party)), _state(memory), packet.body, values)
    together = memory.fields.get(_TOGETHER)
    if phase == "confirmation" and together is not None and list(state.survivors) != list(together):
        expected = f"the {len(together)} clients of the first sum"
        found, remedy = (
            f"{len(state.survivors)}, or others",
            "leave this round's products out; the next one begins anew",
        )
        raise RefusalError(sentence("second sum of the round", expected=expected, found=found, remedy=remedy))
    kept = _keeping(memory, state)
    if phase == "opening":
        tensors = kept.tensors if together is None else _without_products(kept)
        left = {key: value for key, value in tensors.items() if key != _VALUES}
        kept = Memory(left, {**kept.fields, _OPENED: int(packet.manifest["round"])})
    return Packet("secured", {**manifest, PHASE_FIELD: str(phase)}, message), kept


def _joining_again(
    packet: Packet, memory: Memory, party: Party, manifest: Mapping[str, Scalar], passes: Passes
) -> tuple[Packet, Memory]:
    """The reply to an invitation to the second sum of a round: keys; what goes into it is in the memory, as integers.

    Raises:
        RefusalError: the first sum is not confirmed, or the second is open, or it invites to less than the policy.
    """
    channel, state = _channel(party), _state(memory)
    made = {key: value for key, value in memory.tensors.items() if key.startswith(_PRODUCTS)}
    together = memory.fields.get(_TOGETHER, list(state.survivors) if state.phase >= Phase.CONFIRMED else None)
    if not made or not together:
        expected = "a first sum of this round that this client has confirmed, and no second one yet"
        remedy = "ask for training first"
        raise RefusalError(sentence("second sum of the round", expected=expected, found="none", remedy=remedy))
    place = f"bases of partition {party.partition}"
    if len(packet.body) != _EXACT.size(passes.bases):
        expected, remedy = f"{_EXACT.size(passes.bases)} bytes", "use the same adapter settings"
        raise PacketError(sentence(place, expected=expected, found=len(packet.body), remedy=remedy))
    bases = _EXACT.decode(packet.body, passes.bases)
    require_bases(passes, bases, place)
    invitation = _bytes(packet, INVITATION_FIELD)
    state, message = protocol.advertise(_member(party, channel), state, invitation)
    products = {m.path: Factors(*(made[f"{_PRODUCTS}{m.path}.{name}"] for name in "BA")) for m in passes.modules}
    draws = rng(channel.seed, int(packet.manifest["round"]), party.partition, "rounding", AGAIN).bytes
    clients = read_invitation(invitation).clients
    values, _ = as_integers(channel, project(passes, products, bases), passes.second, {}, clients, draws)
    fields = {**memory.fields, _TOGETHER: together, _OPENED: int(packet.manifest["round"])}
    kept = Memory({**memory.tensors, _VALUES: values}, fields)
    return Packet("secured", {**manifest, PHASE_FIELD: AGAIN}, message), _keeping(kept, state)


def _named(product: Factors) -> tuple[tuple[str, np.ndarray], ...]:
    return ("A", product.a), ("B", product.b)


def _without_products(memory: Memory) -> dict[str, np.ndarray]:
    return {key: value for key, value in memory.tensors.items() if not key.startswith(_PRODUCTS)}


def with_secrets(memory: Memory, secrets: Memory) -> Memory:
    """`memory` with what a secure sum keeps, which goes by sums: a round that is done again forgets none of it."""
    return Memory({**memory.tensors, **secrets.tensors}, {**memory.fields, **secrets.fields})


def without_secrets(memory: Memory) -> tuple[Memory, Memory]:
    """`memory` without what `with_secrets` added, and that."""
    tensors = {key: value for key, value in memory.tensors.items() if key.startswith((_VALUES, _PRODUCTS))}
    fields = {key: value for key, value in memory.fields.items() if key in (SECURE, _OPENED, _TOGETHER)}
    rest = Memory(
        {key: value for key, value in memory.tensors.items() if key not in tensors},
        {key: value for key, value in memory.fields.items() if key not in fields},
    )
    return rest, Memory(tensors, fields)


_Act = Callable[[Member, ClientState, bytes, np.ndarray], protocol.Step]

_PHASES: Mapping[str, _Act] = {
    "shares": lambda member, state, body, values: protocol.share(member, state, body),  # noqa: ARG005
    "input": lambda member, state, body, values: protocol.mask(member, state, body, values),
    "confirmation": lambda member, state, body, values: protocol.confirm(member, state, body),  # noqa: ARG005
    "opening": lambda member, state, body, values: protocol.unmask(member, state, body),  # noqa: ARG005
}
"""What a client does in each phase after the first, in order."""


def _member(party: Party, channel: Channel) -> Member:
    policy = channel.policy
    least = max(policy.least_cohort, party.least_cohort)
    own = Policy(least, policy.most_dropout, policy.colluding, policy.failure_bits)
    return Member(party.partition, party.identity.sign, party.identity.registry, own)


def _channel(party: Party) -> Channel:
    if party.channel is None:
        remedy = "run the same settings on both sides"
        raise PacketError(sentence("request", expected="one for a plain channel", found="a secure sum", remedy=remedy))
    return party.channel


def _state(memory: Memory) -> ClientState:
    text = memory.fields.get(SECURE, "")
    return from_bytes(str(text).encode()) if text else ClientState()


def _keeping(memory: Memory, state: ClientState) -> Memory:
    return replace(memory, fields={**memory.fields, SECURE: to_bytes(state).decode()})


def _bytes(packet: Packet, key: str) -> bytes:
    try:
        return bytes.fromhex(str(packet.manifest[key]))
    except (KeyError, ValueError) as error:
        remedy = "run the same version and settings on both sides"
        place = f"{packet.kind} request, {key}"
        raise PacketError(sentence(place, expected="bytes as hexadecimal text", found="none", remedy=remedy)) from error
