"""The keys by which a server and other nodes know a node."""

from __future__ import annotations

from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key

from fedpeft.errors import ConfigError, sentence

KEY_NAME = "an ECDSA P-384 key in OpenSSH's form, without a password"
"""The only kind of key that nodes have."""


def private_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """The key in the file that a node's `server.private_key` names.

    Raises:
        ConfigError: the file cannot be read, or holds no key of that kind.
    """
    try:
        key = load_ssh_private_key(path.read_bytes(), None)
    except OSError as error:
        raise _no_key(path, error.strerror or str(error), "correct server.private_key, or its permissions") from error
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise _no_key(path, "no private key, or one with a password") from error
    if isinstance(key, ec.EllipticCurvePrivateKey) and isinstance(key.curve, ec.SECP384R1):
        return key
    found = f"ECDSA {key.curve.name}" if isinstance(key, ec.EllipticCurvePrivateKey) else type(key).__name__
    raise _no_key(path, found)


def peer_keys(folder: Path) -> dict[int, ec.EllipticCurvePublicKey]:
    """The public keys of a federation's nodes by their partition, from the files `node-PARTITION.pub` in `folder`.

    Raises:
        ConfigError: there are none, or one cannot be read.
    """
    found = {}
    for path in sorted(folder.glob("node-*.pub")):
        number = path.stem.removeprefix("node-")
        try:
            key = load_ssh_public_key(path.read_bytes()) if number.isascii() and number.isdigit() else None
        except (OSError, ValueError, UnsupportedAlgorithm):
            key = None
        if not (isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP384R1)):
            expected, remedy = "the public key of a node, as node-PARTITION.pub", "copy it anew, or take the file away"
            raise ConfigError(sentence(f"peers, {path}", expected=expected, found="none", remedy=remedy))
        found[int(number)] = key
    if not found:
        remedy = "copy the .pub files of all nodes there"
        raise ConfigError(
            sentence(f"peers, {folder}", expected="files node-PARTITION.pub", found="none", remedy=remedy)
        )
    return found


def _no_key(path: Path, found: str, remedy: str = "have one made: python -m server.make_certificates") -> ConfigError:
    return ConfigError(sentence(f"server.private_key, {path}", expected=KEY_NAME, found=found, remedy=remedy))
