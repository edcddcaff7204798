"""What a client does in each phase: a message and a state in, the next state and an answer out.

Keep the new state before the answer is sent: a client that forgets what it has answered can be asked for the rest.
Whatever raises leaves the state as it was, and the client silent, which to the others is a client that dropped out.
Lend one input to one sum only, once its shares may have been opened: two sums over other clients differ by an input.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import numpy as np

from fedpeft.errors import AdapterError, sentence
from fedpeft.privacy.secure import graph, keys, masks, messages, shamir, statements
from fedpeft.privacy.secure.client_state import ClientState, Member, Phase
from fedpeft.privacy.secure.entropy import SYSTEM, Entropy
from fedpeft.privacy.secure.messages import Entry
from fedpeft.privacy.secure.packing import pack, top, word
from fedpeft.privacy.secure.policy import refusal, require_cohort, require_present
from fedpeft.privacy.secure.terms import Terms

Step = tuple[ClientState, bytes]
"""The state to keep, and then the answer to send."""

_LEAVE = "leave the round, and ask who runs the server"


def advertise(member: Member, state: ClientState, invitation: bytes, entropy: Entropy = SYSTEM) -> Step:
    """Phase 0: new keys for this sum, signed.

    Raises:
        RefusalError: the client has shared secrets in this round or a later one, the terms ask for no signatures and
            the client pins keys, or they are below the client's policy.
        PacketError: the message is malformed, here and in every phase.
    """
    terms = messages.read_invitation(invitation)
    place = _place(member, terms, "invitation")
    latest = state.rounds.get(terms.run, -1)
    if terms.round <= latest:
        expected, remedy = f"a round after {latest}, where secrets were shared already", "number each attempt anew"
        raise refusal(place, expected, f"round {terms.round} again", remedy)
    if terms.signed != member.registry.signed:
        expected, found = ("signed keys", "terms without signatures")[:: 1 if member.registry.signed else -1]
        raise refusal(place, expected, found, "give all nodes keys, or none of them")
    require_cohort(member.policy, terms, terms.clients, place)
    sealing, masking = entropy(keys.KEY_BYTES), entropy(keys.KEY_BYTES)
    entry = Entry(member.partition, keys.public_of(sealing), keys.public_of(masking), b"")
    signed = replace(entry, signature=member.sign(statements.keys(terms, entry)))
    step = ClientState(state.rounds, Phase.ADVERTISED, terms, sealing, masking)
    return step, messages.keys(terms, signed)


def share(member: Member, state: ClientState, roster: bytes, entropy: Entropy = SYSTEM) -> Step:
    """Phase 1: shares of the mask key and of a new seed, sealed for those that the client chooses.

    Raises:
        RefusalError: the client's own keys are missing or changed, a key is there twice, a chosen peer's keys are not
            signed by its node, the cohort is below the client's policy, or this round had another roster already.
    """
    terms, place = _at(member, state, Phase.ADVERTISED, "roster")
    entries = messages.read_roster(terms, roster)
    _require_own(member, state, entries, place)
    _require_distinct(entries, place)
    require_cohort(member.policy, terms, len(entries), place)
    others = sorted(set(entries) - {member.partition})
    chosen = graph.chosen(others, min(terms.degree, len(others)), entropy)
    _require_signed(member, terms, entries, chosen, place)
    seed, context, me = entropy(keys.KEY_BYTES), statements.context(terms, roster), member.partition
    seeds, masking = (shamir.split(secret, terms.threshold, (*chosen, me), entropy) for secret in (seed, state.masking))
    sealed = {}
    for peer in chosen:
        key = keys.agreed(state.sealing, entries[peer].sealing, "share", context, (me, peer))
        sealed[peer] = keys.seal(key, masking[peer] + seeds[peer], context, (me, peer), entropy)
    step = replace(
        state,
        rounds={**state.rounds, terms.run: terms.round},
        phase=Phase.SHARED,
        seed=seed,
        own=seeds[me],
        roster=roster,
        chosen=chosen,
    )
    return step, messages.shares(terms, me, sealed)


def mask(member: Member, state: ClientState, inbox: bytes, values: np.ndarray) -> Step:
    """Phase 2: `values` `(length,)`, integers, under masks; and a signature on who shared.

    Raises:
        RefusalError: a share that does not open or was sealed for another, those who shared are not on the roster or
            too few, or a peer that chose this client has keys that are not signed by its node.
        AdapterError: `values` are not integers of the agreed number and width.
    """
    terms, place = _at(member, state, Phase.SHARED, "inbox")
    message, entries = messages.read_inbox(terms, member.partition, inbox), messages.read_roster(terms, state.roster)
    sharers, me = message.sharers, member.partition
    _require_within(sharers, entries, me, "clients on the roster, this one among them", place)
    _require_within(message.sealed, set(sharers) - {me}, None, "shares of others who shared", place)
    require_present(member.policy, terms, len(entries), sharers, _holders(member, state), place)
    _require_signed(member, terms, entries, sorted(set(message.sealed) - set(state.chosen)), place)
    context = statements.context(terms, state.roster)
    held = {
        peer: _opened(member, state, entries[peer], sealed, context, place) for peer, sealed in message.sealed.items()
    }
    masked = _wrapped(values, terms, place)
    added, taken = [keys.self_mask_key(state.seed, context, me)], list[bytes]()
    for peer in sorted((set(state.chosen) & set(sharers)) | set(held)):
        key = keys.mask_key(state.masking, entries[peer].masking, context, me, peer)
        (added if me < peer else taken).append(key)
    masked += masks.summed(terms.words, terms.width, added, taken)
    signature = member.sign(statements.sharers(terms, context, sharers))
    step = replace(state, phase=Phase.MASKED, held=held, sharers=sharers)
    return step, messages.input_(terms, me, signature, pack(masked, terms.width))


def confirm(member: Member, state: ClientState, survivors: bytes) -> Step:
    """Phase 3: a signature on who survived.

    Raises:
        RefusalError: survivors that have not shared, or without this client, or too few; or one whose shares this
            client holds has not signed the same list of those who shared.
    """
    terms, place = _at(member, state, Phase.MASKED, "survivors")
    message, me = messages.read_survivors(terms, member.partition, survivors), member.partition
    _require_within(message.survivors, state.sharers, me, "clients who shared, this one among them", place)
    clients = len(messages.read_roster(terms, state.roster))
    require_present(member.policy, terms, clients, message.survivors, _holders(member, state), place)
    context = statements.context(terms, state.roster)
    statement = statements.sharers(terms, context, state.sharers)
    for peer in sorted(set(state.held) & set(message.survivors)):
        _require_signature(member, peer, statement, message.signatures.get(peer), "the list of who shared", place)
    signature = member.sign(statements.survivors(terms, context, state.sharers, message.survivors))
    step = replace(state, phase=Phase.CONFIRMED, survivors=message.survivors)
    return step, messages.confirmation(terms, me, signature)


def unmask(member: Member, state: ClientState, request: bytes) -> Step:
    """Phase 4: of each owner whose shares the client holds, that of the seed if it survived, else of its mask key.

    The same request may come again and is answered alike.

    Raises:
        RefusalError: a client is called both active and dropped, these are not the lists that this client confirmed
            or has answered before, or fewer than the threshold of its holders signed them, or one wrongly.
    """
    terms, place = _at(member, state, Phase.CONFIRMED, "request", again=True)
    message, me = messages.read_request(terms, member.partition, request), member.partition
    both = sorted(set(message.active) & set(message.dropped))
    if both:
        expected = "each client active or dropped"
        raise refusal(place, expected, f"partition {both[0]} as both, which would show its input", _LEAVE)
    dropped = tuple(sorted(set(state.sharers) - set(state.survivors)))
    if (message.active, message.dropped) != (state.survivors, dropped):
        answered = "that it has answered" if state.phase == Phase.ANSWERED else "that it confirmed"
        expected = f"the {len(state.survivors)} active and {len(dropped)} dropped clients {answered}"
        raise refusal(place, expected, f"{len(message.active)} and {len(message.dropped)}, others", _LEAVE)
    _require_confirmed(member, state, terms, message.signatures, place)
    seeds = {peer: state.held[peer][shamir.SHARE_BYTES :] for peer in state.held if peer in set(message.active)}
    opened = {peer: state.held[peer][: shamir.SHARE_BYTES] for peer in state.held if peer in set(dropped)}
    answer = messages.Opening({**seeds, me: state.own}, opened)
    return replace(state, phase=Phase.ANSWERED), messages.opening(terms, me, answer)


def _place(member: Member, terms: Terms, what: str) -> str:
    return f"client {member.partition}, round {terms.round}, {what}"


def _at(member: Member, state: ClientState, phase: Phase, what: str, *, again: bool = False) -> tuple[Terms, str]:
    """The terms and the place for errors; RefusalError unless the client is in `phase` (or just after it)."""
    if state.terms is None or not phase <= state.phase <= phase + again:
        expected = f"the {what} right after the client has {phase.name.lower()}"
        found = f"one after it has {state.phase.name.lower()}" if state.terms else "one before any invitation"
        raise refusal(f"client {member.partition}, {what}", expected, found, "send each message once and in order")
    return state.terms, _place(member, state.terms, what)


def _holders(member: Member, state: ClientState) -> tuple[int, ...]:
    return (*state.chosen, member.partition)


def _require_own(member: Member, state: ClientState, entries: Mapping[int, Entry], place: str) -> None:
    entry = entries.get(member.partition)
    ours = keys.public_of(state.sealing), keys.public_of(state.masking)
    if entry is None or (entry.sealing, entry.masking) != ours:
        found = "none" if entry is None else "others under its name"
        raise refusal(place, "this client's own keys as it sent them", found, _LEAVE)


def _require_distinct(entries: Mapping[int, Entry], place: str) -> None:
    public = [key for entry in entries.values() for key in (entry.sealing, entry.masking)]
    if len(set(public)) < len(public):
        raise refusal(place, "every public key once", f"{len(public) - len(set(public))} repeated", _LEAVE)


def _require_signed(
    member: Member, terms: Terms, entries: Mapping[int, Entry], peers: Iterable[int], place: str
) -> None:
    for peer in peers:
        entry = entries[peer]
        _require_signature(member, peer, statements.keys(terms, entry), entry.signature, "its keys", place)


def _require_signature(
    member: Member, peer: int, statement: bytes, signature: bytes | None, what: str, place: str
) -> None:
    if signature is None or not member.registry.verify(peer, statement, signature):
        expected = f"partition {peer}'s signature on {what}, by the key registered for its node"
        raise refusal(place, expected, "none" if signature is None else "another", _LEAVE)


def _require_within(found: Iterable[int], allowed: Iterable[int], own: int | None, expected: str, place: str) -> None:
    odd = sorted(set(found) - set(allowed))
    if odd:
        raise refusal(place, expected, f"partition {odd[0]}, which is not", _LEAVE)
    if own is not None and own not in set(found):
        raise refusal(place, expected, "all but this one", "run the round again")


def _require_confirmed(
    member: Member, state: ClientState, terms: Terms, signatures: Mapping[int, bytes], place: str
) -> None:
    """As many holders as the threshold, this client among them, signed the lists that it signed."""
    context = statements.context(terms, state.roster)
    statement = statements.survivors(terms, context, state.sharers, state.survivors)
    theirs = set(state.chosen) & set(state.survivors)
    _require_within(signatures, theirs, None, "signatures of this client's own holders that survived", place)
    for peer, signature in signatures.items():
        _require_signature(member, peer, statement, signature, "the survivors that this client confirmed", place)
    if len(signatures) + 1 < terms.threshold:
        expected = f"signatures of {terms.threshold - 1} of this client's holders on the same survivors"
        raise refusal(place, expected, str(len(signatures)), "ask when enough clients have confirmed")


def _opened(member: Member, state: ClientState, sender: Entry, sealed: bytes, context: bytes, place: str) -> bytes:
    pair = sender.partition, member.partition
    shares = keys.unseal(keys.agreed(state.sealing, sender.sealing, "share", context, pair), sealed, context, pair)
    if shares is None or len(shares) != messages.SHARES_BYTES:
        expected = f"shares that partition {sender.partition} sealed for this client"
        raise refusal(place, expected, "bytes that do not open, or were sealed for another", _LEAVE)
    return shares


def _wrapped(values: np.ndarray, terms: Terms, place: str) -> np.ndarray:
    """The values and the tally, as they are modulo 2^width."""
    half = 1 << (terms.width - 1)
    whole = values.ndim == 1 and len(values) == terms.length and np.issubdtype(values.dtype, np.signedinteger)
    if not whole or not -half <= int(values.min()) <= int(values.max()) < half:
        expected = f"{terms.length} signed integers from {-half} to {half - 1}"
        found = f"{values.dtype} of shape {values.shape}" if not whole else f"{values.min()} to {values.max()}"
        raise AdapterError(sentence(place, expected=expected, found=found, remedy="round and clip before"))
    found_ = np.ones(terms.words, np.int64)
    found_[: terms.length] = values
    return (found_ & top(terms.width)).astype(word(terms.width))
