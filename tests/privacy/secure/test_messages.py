from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.errors import PacketError
from fedpeft.privacy.secure import messages
from fedpeft.privacy.secure.framing import EVERYONE, HEADER_BYTES, Kind, frame, kind_of
from fedpeft.privacy.secure.messages import SEALED_BYTES, Entry, Inbox, Opening, Request, Survivors
from fedpeft.privacy.secure.terms import Terms

TERMS = Terms("run", 3, clients=8, degree=7, threshold=5, length=6, width=11)
UNSIGNED = replace(TERMS, signed=False)
SIGNATURE = 96


def partitions() -> st.SearchStrategy[tuple[int, ...]]:
    return st.sets(st.integers(0, 2**32 - 2), max_size=8).map(lambda found: tuple(sorted(found)))


def tables(size: int) -> st.SearchStrategy[dict[int, bytes]]:
    text = st.binary(min_size=size, max_size=size)
    return partitions().flatmap(
        lambda keys: st.tuples(*[text] * len(keys)).map(lambda texts: dict(zip(keys, texts, strict=True)))
    )


def entries() -> st.SearchStrategy[dict[int, Entry]]:
    return tables(64 + SIGNATURE).map(
        lambda found: {key: Entry(key, text[:32], text[32:64], text[64:]) for key, text in found.items()}
    )


PACKED = -(-(6 + 6) * 11 // 8)
FORMS: dict[Kind, tuple[st.SearchStrategy[Any], Callable[[Any], bytes], Callable[[bytes], Any]]] = {
    Kind.KEYS: (
        entries().filter(bool).map(lambda found: replace(next(iter(found.values())), partition=5)),
        lambda found: messages.keys(TERMS, found),
        lambda data: messages.read_keys(TERMS, 5, data),
    ),
    Kind.ROSTER: (
        entries(),
        lambda found: messages.roster(TERMS, found),
        lambda data: messages.read_roster(TERMS, data),
    ),
    Kind.SHARES: (
        tables(SEALED_BYTES),
        lambda found: messages.shares(TERMS, 5, found),
        lambda data: messages.read_shares(TERMS, 5, data),
    ),
    Kind.INBOX: (
        st.builds(Inbox, partitions(), tables(SEALED_BYTES)),
        lambda found: messages.inbox(TERMS, 5, found),
        lambda data: messages.read_inbox(TERMS, 5, data),
    ),
    Kind.INPUT: (
        st.tuples(st.binary(min_size=SIGNATURE, max_size=SIGNATURE), st.binary(min_size=PACKED, max_size=PACKED)),
        lambda found: messages.input_(TERMS, 5, *found),
        lambda data: messages.read_input(TERMS, 5, data),
    ),
    Kind.SURVIVORS: (
        st.builds(Survivors, partitions(), tables(SIGNATURE)),
        lambda found: messages.survivors(TERMS, 5, found),
        lambda data: messages.read_survivors(TERMS, 5, data),
    ),
    Kind.CONFIRMATION: (
        st.binary(min_size=SIGNATURE, max_size=SIGNATURE),
        lambda found: messages.confirmation(TERMS, 5, found),
        lambda data: messages.read_confirmation(TERMS, 5, data),
    ),
    Kind.REQUEST: (
        st.builds(Request, partitions(), partitions(), tables(SIGNATURE)),
        lambda found: messages.request(TERMS, 5, found),
        lambda data: messages.read_request(TERMS, 5, data),
    ),
    Kind.OPENING: (
        st.builds(Opening, tables(33), tables(33)),
        lambda found: messages.opening(TERMS, 5, found),
        lambda data: messages.read_opening(TERMS, 5, data),
    ),
}


def test_every_kind_has_a_row_in_this_battery_but_the_invitation() -> None:
    assert set(FORMS) == set(Kind) - {Kind.INVITATION}


@pytest.mark.parametrize("kind", FORMS)
@given(data=st.data())
def test_a_message_is_the_same_after_it_was_bytes(kind: Kind, data: st.DataObject) -> None:
    contents, write, read = FORMS[kind]
    message = data.draw(contents)
    written = write(message)
    assert kind_of(written) == kind
    assert read(written) == message


@pytest.mark.parametrize("kind", FORMS)
@given(data=st.data())
def test_whatever_is_changed_it_is_refused_or_is_another_message_in_its_one_form(
    kind: Kind, data: st.DataObject
) -> None:
    contents, write, read = FORMS[kind]
    written = bytearray(write(data.draw(contents)))
    how = data.draw(st.sampled_from(["flip", "cut", "more"]))
    if how == "flip":
        written[data.draw(st.integers(0, len(written) - 1))] ^= data.draw(st.integers(1, 255))
    elif how == "cut":
        del written[data.draw(st.integers(0, len(written) - 1)) :]
    else:
        written += data.draw(st.binary(min_size=1, max_size=300))
    try:
        found = read(bytes(written))
    except PacketError:
        return
    assert how == "flip"
    assert write(found) == written


@pytest.mark.parametrize("kind", FORMS)
def test_a_message_of_another_session_partition_or_kind_is_refused(kind: Kind) -> None:
    _, _, read = FORMS[kind]
    for other, (_, _, read_other) in FORMS.items():
        if other != kind:
            with pytest.raises(PacketError):
                read_other(bare(kind, TERMS, 5))
    with pytest.raises(PacketError, match="round 3 of run run"):
        read(bare(kind, replace(TERMS, round=4), 5))
    with pytest.raises(PacketError, match="another session or for another partition"):
        read(bare(kind, TERMS, 6))


def bare(kind: Kind, terms: Terms, partition: int) -> bytes:
    return frame(kind, terms, partition)


def test_an_invitation_is_read_from_its_bytes_alone() -> None:
    data = messages.invitation(TERMS)
    assert messages.read_invitation(data) == TERMS
    for wrong in (b"", data[:-1], data + b"\0", b"x" + data[1:], data[:20] + b"\xff" + data[21:]):
        with pytest.raises(PacketError):
            messages.read_invitation(wrong)


def test_an_invitation_with_terms_out_of_range_is_refused() -> None:
    data = bytearray(messages.invitation(TERMS))
    data[HEADER_BYTES + 64 + 24 - 4] = 0xFF
    with pytest.raises(PacketError, match="secure sum"):
        messages.read_invitation(bytes(data))


def test_a_count_of_billions_is_refused_before_anything_is_made_of_it() -> None:
    data = bare(Kind.ROSTER, TERMS, EVERYONE) + b"\xff\xff\xff\xff"
    with pytest.raises(PacketError, match="expected at most 8 partitions, found 4294967295"):
        messages.read_roster(TERMS, data)


@pytest.mark.parametrize("found", [(3, 2), (2, 2), (2**32 - 1,)])
def test_a_set_that_is_out_of_order_repeats_or_names_everybody_is_refused(found: tuple[int, ...]) -> None:
    ids = np.array([len(found), *found], ">u4").tobytes()
    with pytest.raises(PacketError, match="partitions in order, each once"):
        messages.read_shares(TERMS, 5, bare(Kind.SHARES, TERMS, 5) + ids + bytes(len(found) * SEALED_BYTES))


def test_without_signatures_none_are_sent_and_none_are_read() -> None:
    data = messages.confirmation(UNSIGNED, 5, b"")
    assert len(data) == HEADER_BYTES
    assert messages.read_confirmation(UNSIGNED, 5, data) == b""
    with pytest.raises(PacketError, match="expected nothing more, found 96 bytes"):
        messages.read_confirmation(UNSIGNED, 5, data + os.urandom(96))
    with pytest.raises(PacketError, match="expected 96 more bytes, found 0"):
        messages.read_confirmation(TERMS, 5, messages.confirmation(TERMS, 5, b""))


def test_noise_is_no_message() -> None:
    for data in (b"", b"fpsa", os.urandom(200), b"fpsa\x02" + bytes(40), b"fpsa\x01\x0a" + bytes(40)):
        with pytest.raises(PacketError, match="message of a secure sum"):
            kind_of(data)
