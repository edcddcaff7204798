"""Each lie that a server could tell, and the client that refuses it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fedpeft.errors import AdapterError, CheckpointError, RefusalError
from fedpeft.privacy.secure import client, keys, messages, server, statements
from fedpeft.privacy.secure.client_state import ClientState, Phase, from_bytes, to_bytes
from fedpeft.privacy.secure.messages import Entry
from fedpeft.privacy.secure.policy import Policy
from fedpeft.privacy.secure.simulation import Outcome, Script, members_of, simulate
from fedpeft.privacy.secure.terms import Terms
from tests.privacy.secure.harness import (
    LENIENT,
    SIGNED,
    TERMS,
    at,
    changed_inbox,
    changed_request,
    changed_roster,
    changed_survivors,
    inputs,
    members,
    refused,
    run,
    signer,
)


def letter_to(found: Outcome, partition: int, phase: str) -> bytes:
    """What a client was sent in a phase."""
    return next(
        one.data for one in found.transcript if (one.partition, one.phase, one.sent) == (partition, phase, False)
    )


def state_at(terms: Terms, phase: Phase, script: Script | None = None) -> Outcome:
    """A sum in which client 0 has got as far as `phase` and no further."""
    following = {Phase.ADVERTISED: "shares", Phase.SHARED: "input", Phase.MASKED: "confirmation"}
    silent = {following[phase]: {0}} if phase in following else {"opening": {0}}
    found = run(terms, script or Script(silent))
    assert found.states[0].phase == phase
    return found


# Phase 0: the invitation.


def test_terms_without_signatures_are_refused_where_keys_are_pinned() -> None:
    with pytest.raises(
        RefusalError, match=r"^client 0, round 3, invitation: expected signed keys, found terms without"
    ):
        client.advertise(members(SIGNED)[0], ClientState(), messages.invitation(TERMS))


def test_terms_with_signatures_are_refused_where_there_are_no_node_keys() -> None:
    with pytest.raises(RefusalError, match="expected terms without signatures, found signed keys"):
        client.advertise(members(TERMS)[0], ClientState(), messages.invitation(SIGNED))


def test_a_cohort_below_the_clients_least_is_refused_at_once() -> None:
    member = replace(members(TERMS)[0], policy=Policy(least_cohort=6))
    with pytest.raises(RefusalError, match="invitation: expected a cohort of 6 to 5 clients, found 5"):
        client.advertise(member, ClientState(), messages.invitation(TERMS))


def test_a_threshold_of_half_of_the_clients_is_refused_at_once() -> None:
    terms = replace(TERMS, clients=6, degree=5)
    with pytest.raises(RefusalError, match=r"expected a threshold above half of the 6 holders, .* found 3"):
        client.advertise(members(terms)[0], ClientState(), messages.invitation(terms))


def test_a_round_that_comes_again_after_secrets_were_shared_is_refused() -> None:
    found = state_at(TERMS, Phase.SHARED)
    for round_ in (3, 2):
        with pytest.raises(RefusalError, match=rf"expected a round after 3, .* found round {round_} again"):
            client.advertise(members()[0], found.states[0], messages.invitation(replace(TERMS, round=round_)))
    # With other terms it is the same round, and its input could be told from the difference of two sums.
    with pytest.raises(RefusalError, match="number each attempt anew"):
        client.advertise(members()[0], found.states[0], messages.invitation(replace(TERMS, length=41)))
    client.advertise(members()[0], found.states[0], messages.invitation(replace(TERMS, round=4)))
    client.advertise(members()[0], found.states[0], messages.invitation(replace(TERMS, run="other", round=0)))


def test_a_round_whose_secrets_were_not_shared_may_come_again() -> None:
    found = state_at(TERMS, Phase.ADVERTISED)
    step, _ = client.advertise(members()[0], found.states[0], messages.invitation(TERMS))
    assert step.masking != found.states[0].masking


# Phase 1: the roster.


def test_a_cohort_that_has_shrunk_below_the_clients_least_is_refused() -> None:
    found = run(TERMS, Script({"keys": {4}}), Policy(least_cohort=5))
    assert "roster: expected a cohort of 5 to 5 clients, found 4" in str(found.refusals[0])


@pytest.mark.parametrize("terms", [TERMS, SIGNED])
def test_other_keys_under_a_clients_own_name_are_refused(terms: Terms) -> None:
    def swap(entries: dict[int, Entry]) -> dict[int, Entry]:
        return {**entries, 0: replace(entries[0], masking=keys.public_of(b"\x05" * 32))}

    why = refused(terms, Script(to_client=at("shares", {0}, changed_roster(terms, swap))), 0)
    assert "roster: expected this client's own keys as it sent them, found others under its name" in why


def test_a_roster_without_the_client_is_refused() -> None:
    drop = changed_roster(TERMS, lambda entries: {one: entries[one] for one in entries if one})
    assert "own keys as it sent them, found none" in refused(TERMS, Script(to_client=at("shares", {0}, drop)), 0)


@pytest.mark.parametrize("field", ["sealing", "masking"])
def test_a_key_that_comes_twice_is_refused(field: str) -> None:
    def twice(entries: dict[int, Entry]) -> dict[int, Entry]:
        return {**entries, 3: replace(entries[3], **{field: getattr(entries[2], field)})}

    why = refused(TERMS, Script(to_client=at("shares", {0}, changed_roster(TERMS, twice))), 0)
    assert "expected every public key once, found 1 repeated" in why


def test_a_key_that_comes_twice_of_one_peer_is_refused() -> None:
    def twice(entries: dict[int, Entry]) -> dict[int, Entry]:
        return {**entries, 3: replace(entries[3], sealing=entries[3].masking)}

    assert "every public key once" in refused(
        TERMS, Script(to_client=at("shares", {0}, changed_roster(TERMS, twice))), 0
    )


def own_entry(partition: int, sign: keys.Sign, terms: Terms = SIGNED) -> Entry:
    """Keys that somebody else made for a partition."""
    entry = Entry(partition, keys.public_of(b"\x06" * 32), keys.public_of(b"\x07" * 32), b"")
    return replace(entry, signature=sign(statements.keys(terms, entry)))


@pytest.mark.parametrize(
    "entry",
    [
        own_entry(2, signer(3)),
        own_entry(2, signer(2), replace(SIGNED, round=2)),
        own_entry(2, lambda message: bytes(96)),
        replace(own_entry(3, signer(2)), partition=2),
    ],
    ids=["another node's", "another round's", "none", "another partition's"],
)
def test_a_peers_keys_that_its_node_has_not_signed_are_refused(entry: Entry) -> None:
    swap = changed_roster(SIGNED, lambda entries: {**entries, 2: entry})
    why = refused(SIGNED, Script(to_client=at("shares", {0}, swap)), 0)
    assert "expected partition 2's signature on its keys, by the key registered for its node, found another" in why


def test_keys_signed_by_the_node_itself_are_taken() -> None:
    # The counterpart of the refusals: it is the signature that decides.
    swap = changed_roster(SIGNED, lambda entries: {**entries, 2: own_entry(2, signer(2))})
    found = run(SIGNED, Script(to_client=at("shares", {0}, swap)))
    assert "roster" not in str(found.refusals.get(0, ""))


def test_a_peer_without_a_registered_key_is_refused() -> None:
    team = members(SIGNED)
    registry = keys.pinned({one: signer_key for one, signer_key in public_keys().items() if one != 4})
    team[0] = replace(team[0], registry=registry)
    # The server's registry is the first member's, so it is given the whole.
    found = simulate(SIGNED, inputs(SIGNED), {1: team[1], **{one: team[one] for one in (0, 2, 3, 4)}})
    assert "partition 4's signature on its keys" in str(found.refusals[0])
    assert found.sum is not None
    assert found.sum.survivors == (1, 2, 3, 4)


def public_keys() -> dict[int, Any]:
    from tests.privacy.secure.harness import node_key

    return {one: node_key(one).public_key() for one in range(5)}


def test_a_second_roster_in_a_round_is_refused() -> None:
    found = state_at(TERMS, Phase.SHARED)
    with pytest.raises(RefusalError, match="roster: expected the roster right after the client has advertised"):
        client.share(members()[0], found.states[0], letter_to(found, 0, "shares"))


@pytest.mark.parametrize("terms", [TERMS, SIGNED])
def test_two_rosters_for_two_groups_open_nothing(terms: Terms) -> None:
    # Partition 4 is left out of what the first group is shown, so that the group's sum would not have it.
    short = changed_roster(terms, lambda entries: {one: entries[one] for one in entries if one != 4})
    found = run(terms, Script({"input": {3}}, to_client=at("shares", {0, 1, 2}, short)))
    assert found.sum is None
    sealed = next(one.data for one in found.transcript if one.partition == 0 and one.phase == "shares" and one.sent)
    box = messages.Inbox((0, 1, 2, 3), {0: messages.read_shares(terms, 0, sealed)[3]})
    with pytest.raises(RefusalError, match="shares that partition 0 sealed for this client, found bytes that do not"):
        client.mask(members(terms)[3], found.states[3], messages.inbox(terms, 3, box), inputs(terms)[3])


# Phase 2: who shared.


def test_a_share_that_was_changed_is_refused() -> None:
    def flip(box: messages.Inbox) -> messages.Inbox:
        return replace(box, sealed={**box.sealed, 2: box.sealed[2][:-1] + bytes([box.sealed[2][-1] ^ 1])})

    why = refused(TERMS, Script(to_client=at("input", {0}, changed_inbox(TERMS, flip))), 0)
    assert "inbox: expected shares that partition 2 sealed for this client, found bytes that do not open" in why


def test_a_share_under_another_senders_name_is_refused() -> None:
    def swap(box: messages.Inbox) -> messages.Inbox:
        return replace(box, sealed={**box.sealed, 2: box.sealed[3], 3: box.sealed[2]})

    why = refused(TERMS, Script(to_client=at("input", {0}, changed_inbox(TERMS, swap))), 0)
    assert "shares that partition 2 sealed for this client" in why


def test_a_share_that_was_sealed_for_another_is_refused() -> None:
    seen: dict[int, bytes] = {}

    def swap(partition: int, data: bytes) -> bytes:
        box = messages.read_inbox(TERMS, partition, data)
        if partition == 0:
            seen.update(box.sealed)
            return data
        return messages.inbox(TERMS, partition, replace(box, sealed={**box.sealed, 2: seen[2]}))

    why = refused(TERMS, Script(to_client=at("input", {0, 1}, swap)), 1)
    assert "shares that partition 2 sealed for this client, found bytes that do not open, or were sealed for" in why


def test_a_clients_own_shares_are_not_sent_back_to_it() -> None:
    def echo(box: messages.Inbox) -> messages.Inbox:
        return replace(box, sealed={**box.sealed, 0: box.sealed[1]})

    why = refused(TERMS, Script(to_client=at("input", {0}, changed_inbox(TERMS, echo))), 0)
    assert "expected shares of others who shared, found partition 0, which is not" in why


@pytest.mark.parametrize(
    ("sharers", "why"),
    [
        ((0, 1, 2, 3, 9), "clients on the roster, this one among them, found partition 9, which is not"),
        ((1, 2, 3, 4), "clients on the roster, this one among them, found all but this one"),
        ((0, 1), "expected at least 3 of the client's own 5 holders, found 2"),
    ],
)
def test_a_false_list_of_who_shared_is_refused(sharers: tuple[int, ...], why: str) -> None:
    def change(box: messages.Inbox) -> messages.Inbox:
        return messages.Inbox(sharers, {one: box.sealed[one] for one in box.sealed if one in sharers})

    assert why in refused(TERMS, Script(to_client=at("input", {0}, changed_inbox(TERMS, change))), 0)


def test_too_many_that_never_shared_are_refused() -> None:
    found = run(TERMS, Script({"shares": {3, 4}}), Policy(most_dropout=0.2))
    assert "inbox: expected at least 4 of 5 clients, found 3" in str(found.refusals[0])


def test_a_share_of_one_that_has_not_shared_is_refused() -> None:
    less = changed_inbox(TERMS, lambda box: replace(box, sharers=(0, 1, 2, 3)))
    assert "shares of others who shared, found partition 4" in refused(
        TERMS, Script(to_client=at("input", {0}, less)), 0
    )


def test_with_random_neighbours_one_that_chose_the_client_must_be_signed_too() -> None:
    terms = Terms("run", 3, clients=40, degree=1, threshold=2, length=3, width=16)
    team = members(terms, LENIENT)
    victim, forged = 0, 1
    member = replace(team[victim], registry=keys.Registry(True, team[victim].registry.verify))
    state = ClientState(
        phase=Phase.SHARED, terms=terms, sealing=b"\x01" * 32, masking=b"\x02" * 32, seed=b"\x03" * 32, chosen=(2,)
    )
    own = Entry(0, keys.public_of(state.sealing), keys.public_of(state.masking), bytes(96))
    roster = messages.roster(
        terms, {0: own, forged: own_entry(forged, signer(7), terms), 2: own_entry(2, signer(2), terms)}
    )
    inbox = messages.Inbox((0, 1, 2), {forged: bytes(messages.SEALED_BYTES)})
    with pytest.raises(RefusalError, match="partition 1's signature on its keys"):
        client.mask(
            member,
            replace(state, roster=roster),
            messages.inbox(terms, 0, inbox),
            np.zeros(3, np.int64),
        )


@pytest.mark.parametrize(
    "values",
    [
        np.zeros(39, np.int64),
        np.zeros((40, 1), np.int64),
        np.zeros(40),
        np.zeros(40, np.uint64),
        np.full(40, 2**19),
        np.full(40, -(2**19) - 1),
    ],
)
def test_an_input_of_another_form_is_not_sent(values: np.ndarray) -> None:
    found = state_at(TERMS, Phase.SHARED)
    with pytest.raises(AdapterError, match=r"expected 40 signed integers from -524288 to 524287, found"):
        client.mask(members()[0], found.states[0], inbox_of(found), values)


def inbox_of(found: Outcome) -> bytes:
    """What client 0 would have been sent in phase 2."""
    assert found.server is not None
    shares = found.server.shares
    box = messages.Inbox(tuple(sorted(shares)), {one: sealed[0] for one, sealed in shares.items() if 0 in sealed})
    return messages.inbox(found.server.terms, 0, box)


def test_a_second_input_is_not_sent() -> None:
    # The difference of two inputs under the same masks would be bare.
    found = state_at(TERMS, Phase.MASKED)
    with pytest.raises(RefusalError, match="inbox: expected the inbox right after the client has shared"):
        client.mask(members()[0], found.states[0], letter_to(found, 0, "input"), inputs()[1])


# Phase 3: who survived.


@pytest.mark.parametrize(
    ("survivors", "why"),
    [
        ((0, 1, 2, 3, 9), "clients who shared, this one among them, found partition 9, which is not"),
        ((1, 2, 3, 4), "clients who shared, this one among them, found all but this one"),
        ((0, 1), "expected at least 3 of the client's own 5 holders, found 2"),
    ],
)
def test_a_false_list_of_survivors_is_refused(survivors: tuple[int, ...], why: str) -> None:
    def change(message: messages.Survivors) -> messages.Survivors:
        return replace(message, survivors=survivors)

    assert why in refused(TERMS, Script(to_client=at("confirmation", {0}, changed_survivors(TERMS, change))), 0)


def test_one_that_never_shared_is_no_survivor() -> None:
    more = changed_survivors(TERMS, lambda message: replace(message, survivors=(0, 1, 2, 3, 4)))
    found = run(TERMS, Script({"shares": {4}}, to_client=at("confirmation", {0}, more)))
    assert "clients who shared, this one among them, found partition 4" in str(found.refusals[0])


def test_more_dropout_than_the_client_allows_is_refused() -> None:
    found = run(TERMS, Script({"input": {3, 4}}), Policy(most_dropout=0.2))
    assert "survivors: expected at least 4 of 5 clients, found 3" in str(found.refusals[0])


@pytest.mark.parametrize("signature", [None, bytes(96)], ids=["missing", "wrong"])
def test_a_survivor_that_saw_another_list_of_sharers_is_refused(signature: bytes | None) -> None:
    def change(message: messages.Survivors) -> messages.Survivors:
        found = {one: text for one, text in message.signatures.items() if one != 2}
        return replace(message, signatures=found if signature is None else {**found, 2: signature})

    why = refused(SIGNED, Script(to_client=at("confirmation", {0}, changed_survivors(SIGNED, change))), 0)
    assert "survivors: expected partition 2's signature on the list of who shared" in why


def test_a_server_that_tells_one_client_that_few_shared_is_found_out() -> None:
    # Client 0 is to mask with 1 and 2 alone; they would then see that it has seen another list.
    def few(box: messages.Inbox) -> messages.Inbox:
        return messages.Inbox((0, 1, 2), {one: box.sealed[one] for one in (1, 2)})

    found = run(SIGNED, Script({"confirmation": {1}}, to_client=at("input", {0}, changed_inbox(SIGNED, few))))
    sent = {one.partition: one.data for one in found.transcript if one.phase == "input" and one.sent}
    signatures = {one: messages.read_input(SIGNED, one, data)[0] for one, data in sent.items() if one != 1}
    everyone = messages.survivors(SIGNED, 1, messages.Survivors((0, 1, 2, 3, 4), signatures))
    with pytest.raises(RefusalError, match="partition 0's signature on the list of who shared"):
        client.confirm(members(SIGNED)[1], found.states[1], everyone)
    less = {one: signature for one, signature in signatures.items() if one}
    others = messages.survivors(SIGNED, 1, messages.Survivors((1, 2, 3, 4), less))
    client.confirm(members(SIGNED)[1], found.states[1], others)


# Phase 4: what to open.


def test_a_client_called_both_active_and_dropped_is_refused() -> None:
    def both(message: messages.Request) -> messages.Request:
        return replace(message, dropped=(*message.dropped, 2))

    why = refused(TERMS, Script(to_client=at("opening", {0}, changed_request(TERMS, both))), 0)
    assert "request: expected each client active or dropped, found partition 2 as both, which would show its" in why


@pytest.mark.parametrize(
    ("active", "dropped"),
    [
        ((0, 1, 2, 3), (4,)),
        ((0, 1, 2, 3), ()),
        ((0, 1, 2, 3, 7), ()),
        ((), (0, 1, 2, 3, 4)),
        ((0, 1, 2, 3, 4), (7,)),
    ],
)
def test_other_lists_than_the_client_confirmed_are_refused(active: tuple[int, ...], dropped: tuple[int, ...]) -> None:
    change = changed_request(TERMS, lambda message: replace(message, active=active, dropped=dropped))
    why = refused(TERMS, Script(to_client=at("opening", {0}, change)), 0)
    assert "request: expected the 5 active and 0 dropped clients that it confirmed, found" in why


def test_a_second_request_is_answered_only_if_it_is_the_same() -> None:
    found = run(SIGNED, Script({"input": {4}}))
    member, state, request = members(SIGNED)[0], found.states[0], letter_to(found, 0, "opening")
    again, answer = client.unmask(member, state, request)
    assert again == state
    first = next(one.data for one in found.transcript if (one.partition, one.phase, one.sent) == (0, "opening", True))
    assert answer == first
    message = messages.read_request(SIGNED, 0, request)
    other = replace(message, active=(0, 1, 2), dropped=(3, 4))
    with pytest.raises(RefusalError, match="the 4 active and 1 dropped clients that it has answered, found 3 and 2"):
        client.unmask(member, state, messages.request(SIGNED, 0, other))


def test_fewer_signatures_than_the_threshold_are_refused() -> None:
    def fewer(message: messages.Request) -> messages.Request:
        return replace(message, signatures=dict(list(message.signatures.items())[1:]))

    for terms in (TERMS, SIGNED):
        why = refused(terms, Script(to_client=at("opening", {0}, changed_request(terms, fewer))), 0)
        assert "expected signatures of 2 of this client's holders on the same survivors, found 1" in why


def test_a_signature_on_other_survivors_is_refused() -> None:
    def forge(message: messages.Request) -> messages.Request:
        return replace(message, signatures={**message.signatures, 1: signer(1)(b"another list")})

    why = refused(SIGNED, Script(to_client=at("opening", {0}, changed_request(SIGNED, forge))), 0)
    assert "partition 1's signature on the survivors that this client confirmed" in why


def test_a_clients_own_signature_or_a_strangers_does_not_count() -> None:
    for stranger in (0, 9):
        change = changed_request(
            TERMS, lambda message, one=stranger: replace(message, signatures={**message.signatures, one: b""})
        )
        why = refused(TERMS, Script(to_client=at("opening", {0}, change)), 0)
        assert f"own holders that survived, found partition {stranger}, which is not" in why


def test_two_lists_of_survivors_for_two_groups_open_nothing() -> None:
    # To 0, 1 and 2 the server says that 4 has dropped, to 3 and 4 that all are there.
    without = changed_survivors(
        SIGNED,
        lambda message: messages.Survivors(
            (0, 1, 2, 3), {one: text for one, text in message.signatures.items() if one != 4}
        ),
    )
    found = run(SIGNED, Script(to_client=at("confirmation", {0, 1, 2}, without)))
    assert found.sum is None
    # Its own gatherer drops the signatures on the other list, and a server of another mind has too few of either.
    assert "confirmations" in str(found.failure)
    assert not any(letter.phase == "opening" for letter in found.transcript)


def test_a_client_never_gives_out_both_shares_of_one_owner() -> None:
    for script in (Script(), Script({"input": {4}}), Script({"shares": {1}, "input": {4}, "confirmation": {3}})):
        found = run(TERMS, script)
        for letter in found.transcript:
            if letter.phase == "opening" and letter.sent:
                opening = messages.read_opening(TERMS, letter.partition, letter.data)
                assert not set(opening.seeds) & set(opening.keys)
                assert set(opening.keys) <= {4}
                assert 4 not in opening.seeds or not opening.keys


# What is kept.


def test_messages_out_of_order_are_refused() -> None:
    member, nothing = members()[0], ClientState()
    for act in (client.share, client.confirm, client.unmask):
        with pytest.raises(RefusalError, match="found one before any invitation"):
            act(member, nothing, b"")
    with pytest.raises(RefusalError, match="found one before any invitation"):
        client.mask(member, nothing, b"", inputs()[0])
    with pytest.raises(RefusalError, match="right after the client has confirmed, found one after it has masked"):
        client.unmask(member, state_at(TERMS, Phase.MASKED).states[0], b"")


def test_a_refusal_leaves_the_state_as_it_was() -> None:
    found = run(TERMS, Script(to_client=at("opening", {0}, lambda partition, data: data[:-1])))
    assert found.states[0].phase == Phase.CONFIRMED


def test_what_is_no_state_is_refused() -> None:
    good = to_bytes(state_at(TERMS, Phase.MASKED).states[0])
    assert from_bytes(good).phase == Phase.MASKED
    for bad in (b"", b"[]", b"{}", good[:-5], good.replace(b'"phase": 3', b'"phase": 9')):
        with pytest.raises(CheckpointError, match="expected a client's state in a secure sum"):
            from_bytes(bad)


def test_members_without_node_keys_are_for_simulations() -> None:
    assert not members_of([1, 2], LENIENT)[1].registry.signed
    assert isinstance(server.ServerState(TERMS, keys.OPEN), server.ServerState)
