from __future__ import annotations

import os

import pytest
from cryptography.hazmat.primitives import serialization

from fedpeft.errors import PacketError
from fedpeft.privacy.secure import keys
from fedpeft.privacy.secure.keys import (
    OPEN,
    SEAL_BYTES,
    SIGNATURE_BYTES,
    agreed,
    mask_key,
    pinned,
    public_of,
    seal,
    self_mask_key,
    unseal,
    unsigned,
    usable,
)
from server.make_certificates import add_node
from tests.privacy.secure.harness import node_key, signer

ONE, OTHER = b"\x01" * 32, b"\x02" * 32
SMALL_ORDER = bytes(32)


def test_two_clients_make_the_same_mask_and_nobody_else_does() -> None:
    ours = mask_key(ONE, public_of(OTHER), b"context", 4, 9)
    assert ours == mask_key(OTHER, public_of(ONE), b"context", 9, 4)
    others = {
        mask_key(ONE, public_of(OTHER), b"another", 4, 9),
        mask_key(ONE, public_of(OTHER), b"context", 4, 8),
        mask_key(ONE, public_of(ONE), b"context", 4, 9),
        agreed(ONE, public_of(OTHER), "share", b"context", (4, 9)),
        agreed(ONE, public_of(OTHER), "share", b"context", (9, 4)),
        self_mask_key(ONE, b"context", 4),
    }
    assert len(others) == 6
    assert ours not in others


def test_masks_have_keys_of_full_entropy() -> None:
    found = {self_mask_key(seed.to_bytes(32, "big"), b"", 0) for seed in range(200)}
    assert len(found) == 200
    assert {len(key) for key in found} == {32}


def test_a_signature_holds_for_its_node_and_its_message_alone() -> None:
    registry = pinned({0: node_key(0).public_key(), 1: node_key(1).public_key()})
    signature = signer(0)(b"message")
    assert len(signature) == SIGNATURE_BYTES
    assert registry.verify(0, b"message", signature)
    assert not registry.verify(0, b"massage", signature)
    assert not registry.verify(1, b"message", signature)
    assert not registry.verify(2, b"message", signature)
    for wrong in (b"", signature[:-1], signature + b"\0", bytes(SIGNATURE_BYTES), b"\xff" * SIGNATURE_BYTES):
        assert not registry.verify(0, b"message", wrong)


def test_the_keys_that_are_made_for_nodes_sign(tmp_path: os.PathLike[str]) -> None:
    from pathlib import Path

    add_node(Path(tmp_path), "node-0")
    private = serialization.load_ssh_private_key(Path(tmp_path, "node-0").read_bytes(), None)
    public = serialization.load_ssh_public_key(Path(tmp_path, "node-0.pub").read_bytes())
    assert pinned({0: public}).verify(0, b"message", keys.signing(private)(b"message"))  # type: ignore[dict-item, arg-type]


def test_without_node_keys_only_the_absence_of_a_signature_counts() -> None:
    assert OPEN.verify(5, b"message", unsigned(b"message"))
    assert not OPEN.verify(5, b"message", bytes(SIGNATURE_BYTES))


def test_what_is_sealed_opens_for_whom_it_is_for_only() -> None:
    sealed = seal(ONE, b"shares", b"context", (3, 4), os.urandom)
    assert len(sealed) == len(b"shares") + SEAL_BYTES
    assert unseal(ONE, sealed, b"context", (3, 4)) == b"shares"
    assert unseal(OTHER, sealed, b"context", (3, 4)) is None
    assert unseal(ONE, sealed, b"another", (3, 4)) is None
    assert unseal(ONE, sealed, b"context", (4, 3)) is None
    for at in range(len(sealed)):
        changed = bytes(byte ^ (number == at) for number, byte in enumerate(sealed))
        assert unseal(ONE, changed, b"context", (3, 4)) is None


def test_a_key_with_which_everybody_agrees_on_the_same_is_refused() -> None:
    assert usable(public_of(ONE))
    assert not usable(SMALL_ORDER)
    with pytest.raises(PacketError, match="partitions 3 and 4: expected a point of full order"):
        agreed(ONE, SMALL_ORDER, "mask", b"", (3, 4))
