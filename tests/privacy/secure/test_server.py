"""What clients could send that is not what was asked, and what the server makes of it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from fedpeft.errors import FederationError, QuorumError
from fedpeft.privacy.secure import keys, messages, opening, server, statements
from fedpeft.privacy.secure.messages import Entry
from fedpeft.privacy.secure.simulation import PHASES, Script
from fedpeft.privacy.secure.terms import Terms
from tests.privacy.secure.harness import SIGNED, TERMS, at, inputs, members, node_key, run, signer


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("damage", [lambda one, data: data[:-1], lambda one, data: data + b"\0", lambda one, data: b""])
def test_a_malformed_reply_counts_as_none_and_is_named(phase: str, damage: object) -> None:
    found = run(SIGNED, Script(to_server=at(phase, {2}, damage)))  # type: ignore[arg-type]
    assert found.sum is not None, found.failure
    late = phase in ("confirmation", "opening")
    assert found.sum.survivors == ((0, 1, 2, 3, 4) if late else (0, 1, 3, 4))
    assert found.sum.total.tolist() == sum(inputs(SIGNED)[one] for one in found.sum.survivors).tolist()
    assert [partition for partition, _ in found.sum.refused] == [2]
    assert "partition 2" in found.sum.refused[0][1] or "message of a secure sum" in found.sum.refused[0][1]


@pytest.mark.parametrize("phase", ["keys", "input", "confirmation"])
def test_a_reply_that_the_node_has_not_signed_counts_as_none(phase: str) -> None:
    def forge(one: int, data: bytes) -> bytes:
        other = signer(9)(b"")
        if phase == "keys":
            return messages.keys(SIGNED, replace(messages.read_keys(SIGNED, one, data), signature=other))
        if phase == "input":
            return messages.input_(SIGNED, one, other, messages.read_input(SIGNED, one, data)[1])
        return messages.confirmation(SIGNED, one, other)

    found = run(SIGNED, Script(to_server=at(phase, {2}, forge)))
    assert found.sum is not None
    assert found.sum.refused[0][0] == 2
    assert "a signature by its node's key" in found.sum.refused[0][1]


def entry_of(partition: int, sealing: bytes, masking: bytes) -> tuple[int, bytes]:
    entry = Entry(partition, sealing, masking, b"")
    signed = replace(entry, signature=signer(partition)(statements.keys(SIGNED, entry)))
    return partition, messages.keys(SIGNED, signed)


def public(number: int) -> bytes:
    return keys.public_of(bytes([number]) * 32)


@pytest.mark.parametrize(
    "bad",
    [
        entry_of(3, public(1), public(9)),
        entry_of(3, public(9), public(2)),
        entry_of(3, public(9), public(9)),
        entry_of(3, bytes(32), public(9)),
        entry_of(3, public(9), bytes(32)),
        entry_of(0, public(9), public(10)),
        (9, entry_of(3, public(9), public(10))[1]),
    ],
    ids=["sealing of another", "masking of another", "one for both", "small", "small mask", "second", "stranger"],
)
def test_keys_that_others_have_or_that_hide_nothing_count_as_none(bad: tuple[int, bytes]) -> None:
    good = [entry_of(one, public(2 * one + 1), public(2 * one + 2)) for one in range(3)]
    registry = keys.pinned({one: node_key(one).public_key() for one in range(5)})
    state, outbox = server.gather_keys(SIGNED, registry, range(5), [*good, bad])
    assert set(outbox) == {0, 1, 2}
    assert [partition for partition, _ in state.refused] == [bad[0]]
    assert set(messages.read_roster(SIGNED, outbox[0])) == {0, 1, 2}


def test_shares_for_others_than_asked_count_as_none() -> None:
    def fewer(one: int, data: bytes) -> bytes:
        return messages.shares(TERMS, one, dict(list(messages.read_shares(TERMS, one, data).items())[1:]))

    def own(one: int, data: bytes) -> bytes:
        sealed = messages.read_shares(TERMS, one, data)
        return messages.shares(TERMS, one, {**{other: sealed[other] for other in (0, 1, 3)}, 2: sealed[4]})

    for change in (fewer, own):
        found = run(TERMS, Script(to_server=at("shares", {2}, change)))
        assert found.sum is not None
        assert found.sum.survivors == (0, 1, 3, 4)
        assert "expected shares for 4 others on the roster" in found.sum.refused[0][1]


def test_a_second_input_of_a_client_does_not_count() -> None:
    found = run(TERMS, Script({"confirmation": {0}}))
    sent = [(one.partition, one.data) for one in found.transcript if one.phase == "input" and one.sent]
    assert found.server is not None
    state = replace(found.server, refused=())
    once, _ = server.gather_inputs(state, sent)
    twice, _ = server.gather_inputs(state, [*sent, sent[0], (7, sent[0][1])])
    assert (once.total == twice.total).all()
    assert [partition for partition, _ in twice.refused] == [0, 7]


def test_a_false_share_of_a_seed_is_found_by_the_tally() -> None:
    def lie(one: int, data: bytes) -> bytes:
        found = messages.read_opening(TERMS, one, data)
        return messages.opening(TERMS, one, replace(found, seeds={**found.seeds, 3: bytes(32) + b"\x01"}))

    found = run(TERMS, Script(to_server=at("opening", {0}, lie)))
    assert found.sum is None
    assert isinstance(found.failure, FederationError)
    assert "a tally of 5 inputs" in str(found.failure) or "do not fit together" in str(found.failure)


def test_a_false_share_of_a_mask_key_is_found_by_the_public_key() -> None:
    def lie(one: int, data: bytes) -> bytes:
        found = messages.read_opening(TERMS, one, data)
        return messages.opening(TERMS, one, replace(found, keys={4: bytes(32) + b"\x01"}))

    found = run(TERMS, Script({"input": {4}}, to_server=at("opening", {0}, lie)))
    assert "partition 4's mask key" in str(found.failure) or "do not fit together" in str(found.failure)


def test_a_client_that_masks_wrongly_is_found_by_the_tally() -> None:
    def noise(one: int, data: bytes) -> bytes:
        signature, packed = messages.read_input(TERMS, one, data)
        return messages.input_(TERMS, one, signature, bytes(byte ^ 0x55 for byte in packed))

    found = run(TERMS, Script(to_server=at("input", {1}, noise)))
    assert found.sum is None
    assert "a tally of 5 inputs" in str(found.failure)


def test_shares_that_a_client_does_not_hold_or_was_not_asked_for_count_as_none() -> None:
    def more(one: int, data: bytes) -> bytes:
        found = messages.read_opening(TERMS, one, data)
        return messages.opening(TERMS, one, replace(found, keys={3: bytes(33)}))

    found = run(TERMS, Script(to_server=at("opening", {0}, more)))
    assert found.sum is not None
    assert "seeds of survivors and keys of those who dropped" in found.sum.refused[0][1]

    sparse = Terms("run", 3, clients=60, degree=20, threshold=13, length=4, width=16, signed=False)

    def stray(one: int, data: bytes) -> bytes:
        found = messages.read_opening(sparse, one, data)
        return messages.opening(sparse, one, replace(found, seeds=dict.fromkeys(range(60), bytes(33))))

    found = run(sparse, Script(to_server=at("opening", {0}, stray)))
    assert found.sum is not None
    assert "shares that it holds" in found.sum.refused[0][1]


def test_too_few_keys_end_the_round_and_say_how_many_were_refused() -> None:
    with pytest.raises(QuorumError, match="keys: expected those of at least 3 clients, found 0, 4 replies refused"):
        server.gather_keys(TERMS, keys.OPEN, range(5), [(one, b"") for one in range(4)])


def test_inputs_are_taken_as_they_come_and_not_kept() -> None:
    found = run(TERMS, Script({"confirmation": {0}}))
    sent = {one.partition: one.data for one in found.transcript if one.phase == "input" and one.sent}
    alive: list[int] = []

    def arriving():  # type: ignore[no-untyped-def]
        for partition, data in sent.items():
            alive.append(partition)
            yield partition, data

    assert found.server is not None
    state, _ = server.gather_inputs(replace(found.server, refused=()), arriving())
    assert alive == list(sent)
    assert state.total.nbytes == 4 * TERMS.words


def test_sums_are_read_as_signed_numbers_of_the_width() -> None:
    terms = replace(TERMS, width=8, length=4)
    residues = np.array([0, 127, 128, 255] + [3] * terms.tally, np.uint32)
    assert opening.counted(terms, residues, 3).tolist() == [0, 127, -128, -1]
    with pytest.raises(FederationError, match="expected a tally of 2 inputs"):
        opening.counted(terms, residues, 2)


def test_a_member_without_an_answer_in_the_last_phase_is_in_the_sum() -> None:
    found = run(SIGNED, Script({"opening": {0, 1}}))
    assert found.sum is not None
    assert found.sum.survivors == tuple(members(SIGNED))
