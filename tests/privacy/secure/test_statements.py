from __future__ import annotations

from dataclasses import replace

from fedpeft.privacy.secure import statements
from fedpeft.privacy.secure.messages import Entry
from tests.privacy.secure.harness import TERMS

OTHER = replace(TERMS, round=4)
ENTRY = Entry(1, b"\x01" * 32, b"\x02" * 32, b"")


def test_no_two_things_that_a_node_can_sign_are_the_same_bytes() -> None:
    roster, another = statements.context(TERMS, b"roster"), statements.context(TERMS, b"another")
    signed = [
        statements.keys(TERMS, ENTRY),
        statements.keys(OTHER, ENTRY),
        statements.keys(TERMS, replace(ENTRY, partition=2)),
        statements.keys(TERMS, replace(ENTRY, sealing=b"\x03" * 32)),
        statements.keys(TERMS, replace(ENTRY, masking=b"\x03" * 32)),
        statements.sharers(TERMS, roster, (1, 2, 3)),
        statements.sharers(TERMS, roster, (1, 2)),
        statements.sharers(TERMS, another, (1, 2, 3)),
        statements.sharers(OTHER, roster, (1, 2, 3)),
        statements.survivors(TERMS, roster, (1, 2, 3), (1, 2)),
        statements.survivors(TERMS, roster, (1, 2, 3), (1, 3)),
        statements.survivors(TERMS, roster, (1, 2), (1, 2)),
        statements.survivors(TERMS, another, (1, 2, 3), (1, 2)),
        statements.survivors(OTHER, roster, (1, 2, 3), (1, 2)),
    ]
    assert len(set(signed)) == len(signed)


def test_the_order_in_which_partitions_are_named_says_nothing() -> None:
    assert statements.sharers(TERMS, b"", (3, 1, 2)) == statements.sharers(TERMS, b"", (1, 2, 3))


def test_a_roster_means_something_else_in_another_session() -> None:
    assert statements.context(TERMS, b"roster") != statements.context(OTHER, b"roster")
