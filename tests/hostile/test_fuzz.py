import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeft.engines.flower_messages import to_packet
from fedpeft.errors import PacketError
from fedpeft.wire import Packet
from simulations.robustness.fuzz import fuzz, outcome
from simulations.robustness.mutations import VALID, mutated, receive, to_records


def test_valid_messages_are_used() -> None:
    assert [outcome(which, to_records(packet)) for which, packet in enumerate(VALID)] == [("used", "")] * len(VALID)


def test_two_thousand_altered_messages_are_used_or_refused() -> None:
    tally = fuzz(2000, seed=7)
    assert tally.unexpected == {}
    assert set(tally.outcomes) == {"used", "PacketError", "AdapterError"}
    assert tally.greatest_bytes < 10**6


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_every_combination_of_changes_is_used_or_refused(data: st.DataObject) -> None:
    which, records = mutated(lambda most: data.draw(st.integers(0, most - 1)))
    assert outcome(which, records)[1] == ""


def test_the_same_seed_and_number_make_the_same_message() -> None:
    assert fuzz(50, seed=3).outcomes == fuzz(50, seed=3).outcomes


def test_a_kind_as_long_as_a_book_is_refused_in_a_short_line() -> None:
    which, records = mutated(random.Random("0/18334").randrange)
    with pytest.raises(PacketError) as caught:
        receive(which, records)
    assert len(str(caught.value)) < 1000
    with pytest.raises(PacketError, match="kind: expected at most 256 characters, found 5000"):
        to_packet(to_records(Packet("9" * 5000)))
