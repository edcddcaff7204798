"""Who a client is, what two clients agree on in secret, and what one seals for the other.

Pairs agree by X25519; HKDF-SHA256 makes a key of what they agreed on, bound to the roster, the purpose and the two;
shares are sealed by AES-256-GCM; node keys sign by ECDSA over P-384 with SHA-384.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from typing import NamedTuple

from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedpeft.errors import PacketError, sentence
from fedpeft.privacy.secure.entropy import Entropy

KEY_BYTES = 32
SIGNATURE_BYTES = 96
SEAL_BYTES = 28
"""How many bytes sealing adds: the nonce and the tag."""

_NONCE_BYTES = 12
_HALF = SIGNATURE_BYTES // 2
_PAIR = struct.Struct(">II")

Sign = Callable[[bytes], bytes]
"""`sign(message)`: the signature of the node, of `SIGNATURE_BYTES`, or none."""


class Registry(NamedTuple):
    """Whose signatures count: `verify(partition, message, signature)` says whether that node signed that message.

    `signed` is whether there are signatures at all.
    """

    signed: bool
    verify: Callable[[int, bytes, bytes], bool]


def unsigned(message: bytes) -> bytes:  # noqa: ARG001
    """No signature, for clients that are simulated in one process."""
    return b""


OPEN = Registry(signed=False, verify=lambda partition, message, signature: not signature)  # noqa: ARG005
"""Takes everybody for whom they say they are: for simulations, where nobody is to be kept from playing a client."""


def signing(key: ec.EllipticCurvePrivateKey) -> Sign:
    """Signatures by a node's key, on P-384."""

    def sign(message: bytes) -> bytes:
        r, s = decode_dss_signature(key.sign(message, ec.ECDSA(hashes.SHA384())))
        return r.to_bytes(_HALF, "big") + s.to_bytes(_HALF, "big")

    return sign


def pinned(keys: Mapping[int, ec.EllipticCurvePublicKey]) -> Registry:
    """Only signatures by the key that is registered for a partition count; a partition without a key has none."""

    def verify(partition: int, message: bytes, signature: bytes) -> bool:
        if partition not in keys or len(signature) != SIGNATURE_BYTES:
            return False
        r, s = (int.from_bytes(half, "big") for half in (signature[:_HALF], signature[_HALF:]))
        try:
            keys[partition].verify(encode_dss_signature(r, s), message, ec.ECDSA(hashes.SHA384()))
        except InvalidSignature:
            return False
        return True

    return Registry(signed=True, verify=verify)


def public_of(secret: bytes) -> bytes:
    """The public half, 32 bytes, of a secret of 32 bytes."""
    return X25519PrivateKey.from_private_bytes(secret).public_key().public_bytes_raw()


def agreed(secret: bytes, public: bytes, purpose: str, context: bytes, pair: tuple[int, int]) -> bytes:
    """A key of 32 bytes that only the two can know; another purpose, context or pair gives another key.

    Raises:
        PacketError: the public key is one of the few with which every secret agrees on the same.
    """
    try:
        shared = X25519PrivateKey.from_private_bytes(secret).exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError as error:
        place, remedy = f"public key of one of partitions {pair[0]} and {pair[1]}", "leave that node out"
        raise PacketError(
            sentence(place, expected="a point of full order", found="one of small order", remedy=remedy)
        ) from error
    return derived(shared, purpose, context, _PAIR.pack(*pair))


def usable(public: bytes) -> bool:
    """Whether what others agree on with the holder of this key depends on their secrets."""
    try:
        X25519PrivateKey.from_private_bytes(bytes(KEY_BYTES)).exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError:
        return False
    return True


def derived(secret: bytes, purpose: str, context: bytes, owner: bytes) -> bytes:
    """A key of 32 bytes from a secret, for one purpose."""
    info = b"fedpeft secure sum 1|" + purpose.encode() + b"|" + context + owner
    return HKDF(hashes.SHA256(), KEY_BYTES, None, info).derive(secret)


def mask_key(secret: bytes, public: bytes, context: bytes, one: int, other: int) -> bytes:
    """The key of the mask that two clients share; the same from either side."""
    return agreed(secret, public, "mask", context, (min(one, other), max(one, other)))


def self_mask_key(seed: bytes, context: bytes, partition: int) -> bytes:
    """The key of a client's own mask."""
    return derived(seed, "self mask", context, _PAIR.pack(partition, partition))


def seal(key: bytes, message: bytes, context: bytes, pair: tuple[int, int], entropy: Entropy) -> bytes:
    """`message` for the second of `pair` from the first, to be read with `key` only; `SEAL_BYTES` longer."""
    nonce = entropy(_NONCE_BYTES)
    return nonce + AESGCM(key).encrypt(nonce, message, context + _PAIR.pack(*pair))


def unseal(key: bytes, sealed: bytes, context: bytes, pair: tuple[int, int]) -> bytes | None:
    """The message that was sealed with this key, in this context, for this pair; None if that is not what it is."""
    try:
        return AESGCM(key).decrypt(sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], context + _PAIR.pack(*pair))
    except InvalidTag:
        return None
