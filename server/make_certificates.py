"""Certificates for a SuperLink, and a key for each SuperNode: `python -m server.make_certificates FOLDER --nodes 2`.

`FOLDER` then holds `ca.crt` (goes to everybody), `server.pem` and `server.key` (stay with the SuperLink), and for
each node `node-N` (goes to that node alone) and `node-N.pub` (is registered with the SuperLink). Keys are readable
by their owner alone. The authority's own key is thrown away: to renew anything, make all of it anew.
"""

from __future__ import annotations

import argparse
import ipaddress
import os
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID


def make_certificates(folder: Path, hosts: list[str], nodes: int, days: int) -> None:
    """`folder` holds a new set of certificates and keys; the server's certificate is valid for `hosts`.

    Raises:
        FileExistsError: `folder` holds something already.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise FileExistsError("files in it")
    authority, server = ec.generate_private_key(ec.SECP384R1()), ec.generate_private_key(ec.SECP384R1())
    issuer = _name("fedpeft certificate authority")
    ca = _certificate(issuer, issuer, authority.public_key(), authority.public_key(), days)
    ca = ca.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    ca = ca.add_extension(_usage(signs_certificates=True), critical=True)
    leaf = _certificate(_name(hosts[0]), issuer, server.public_key(), authority.public_key(), days)
    leaf = leaf.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    leaf = leaf.add_extension(_usage(signs_certificates=False), critical=True)
    leaf = leaf.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
    leaf = leaf.add_extension(x509.SubjectAlternativeName([_alternative(host) for host in hosts]), critical=False)
    pem = serialization.Encoding.PEM
    _write(folder / "ca.crt", ca.sign(authority, hashes.SHA384()).public_bytes(pem), 0o644)
    _write(folder / "server.pem", leaf.sign(authority, hashes.SHA384()).public_bytes(pem), 0o644)
    _write(folder / "server.key", _private(server, serialization.PrivateFormat.PKCS8), 0o600)
    for node in range(nodes):
        key = ec.generate_private_key(ec.SECP384R1())
        public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
        _write(folder / f"node-{node}", _private(key, serialization.PrivateFormat.OpenSSH), 0o600)
        _write(folder / f"node-{node}.pub", public + b"\n", 0o644)


def _certificate(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, signer: ec.EllipticCurvePublicKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder(subject_name=subject, issuer_name=issuer, public_key=key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(minutes=5))
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer), critical=False)
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _alternative(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _private(key: ec.EllipticCurvePrivateKey, form: serialization.PrivateFormat) -> bytes:
    return key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())


def _write(path: Path, data: bytes, mode: int) -> None:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        file.write(data)


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description="Make certificates for a SuperLink and keys for its SuperNodes.")
    parser.add_argument("folder", type=Path, help="a folder that does not exist yet, or is empty")
    parser.add_argument("--host", action="append", help="a name or address of the SuperLink; give it once for each")
    parser.add_argument("--nodes", type=int, default=2, help="how many node keys to make (2)")
    parser.add_argument("--days", type=int, default=90, help="how long the certificates are valid (90)")
    asked = parser.parse_args()
    try:
        make_certificates(asked.folder, asked.host or ["localhost", "127.0.0.1"], asked.nodes, asked.days)
    except OSError as error:
        sys.exit(f"{asked.folder}: expected a new or empty folder that can be written, found {error}; name another.")


if __name__ == "__main__":
    main()
