"""Certificates for a SuperLink, and a key for each SuperNode: `python -m server.make_certificates FOLDER --nodes 2`.

`FOLDER` then holds `ca.crt` (goes to everybody), `server.pem` and `server.key` (stay with the SuperLink), `ca.key`
(signs a new `server.pem`; keep it away from the server), and for each node `node-N` (goes to that node alone) and
`node-N.pub` (is registered with the SuperLink). Keys are readable by their owner alone. Nothing that is there is ever
overwritten, but for the server's own pair by `--renew`.
"""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated

import typer
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedpeft.cli import script
from fedpeft.errors import ConfigError, FederationError, sentence
from fedpeft.files import write_atomically

LOOPBACK = ("localhost", "127.0.0.1")
"""Every server's certificate is valid for these too: its own machine controls it, and checks its health, there."""

RENEW_DAYS = 14
"""A certificate that is valid for fewer days should be renewed."""

_AUTHORITY_DAYS = 3650
_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,62}")
_TAKEN = {"ca.crt", "ca.key", "server.pem", "server.key"}


def make_certificates(folder: Path, hosts: Sequence[str], nodes: int, days: int) -> None:
    """`folder` holds a new set of certificates and keys; the server's certificate is valid for `hosts` and loopback.

    Raises:
        ConfigError: `folder` holds something already, or cannot be written.
    """
    _require_hosts(hosts)
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise _unusable(folder, "files in it", "name a new folder, or see --add and --renew")
        folder.chmod(0o700)
        authority = ec.generate_private_key(ec.SECP384R1())
        issuer = _name("fedpeft certificate authority")
        ca = _certificate(issuer, issuer, authority.public_key(), authority.public_key(), max(days, _AUTHORITY_DAYS))
        ca = ca.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        signed = ca.add_extension(_usage(signs_certificates=True), critical=True).sign(authority, hashes.SHA384())
        _write(folder / "ca.crt", signed.public_bytes(serialization.Encoding.PEM), 0o644)
        _write(folder / "ca.key", _private(authority, serialization.PrivateFormat.PKCS8), 0o600)
        _sign_server(folder, signed, authority, hosts, days)
        for node in range(nodes):
            add_node(folder, f"node-{node}")
    except OSError as error:
        raise _unusable(folder, (error.strerror or str(error)).lower(), "name another folder") from error


def add_node(folder: Path, name: str) -> None:
    """`folder` holds a new key for the node `name`, and its public half; nothing else has changed.

    Raises:
        ConfigError: there is such a key, the name cannot be a file's, or the folder cannot be written.
    """
    if not _NAME.fullmatch(name) or name in _TAKEN or name.endswith(".pub"):
        expected = "small letters, digits, '-', '_' and '.', not ending in .pub"
        raise ConfigError(sentence("node", expected=expected, found=repr(name), remedy="name the node otherwise"))
    if (folder / name).exists() or (folder / f"{name}.pub").exists():
        remedy = "name the node otherwise; to replace a key, move what there is of it away"
        raise _unusable(folder, f"a key of {name}", remedy, expected="no such key yet")
    key = ec.generate_private_key(ec.SECP384R1())
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    try:
        _write(folder / name, _private(key, serialization.PrivateFormat.OpenSSH), 0o600)
        _write(folder / f"{name}.pub", public + f" {name}\n".encode(), 0o644)
    except OSError as error:
        raise _unusable(folder, (error.strerror or str(error)).lower(), "name the folder of the keys") from error


def renew(folder: Path, hosts: Sequence[str], days: int) -> None:
    """The server has a new key and certificate, signed by the same authority; `hosts` empty: for the same hosts.

    Nodes need nothing new. A SuperLink that runs goes on with the old pair until it is started again.

    Raises:
        ConfigError: the authority, its key or the old certificate is missing or cannot be read.
    """
    _require_hosts(hosts)
    ca, old = certificate(folder / "ca.crt"), certificate(folder / "server.pem")
    try:
        authority = serialization.load_pem_private_key((folder / "ca.key").read_bytes(), None)
    except (OSError, ValueError, TypeError) as error:
        remedy = "bring ca.key back, or make a new set and give every node the new ca.crt"
        raise ConfigError(
            sentence(str(folder / "ca.key"), expected="the authority's key", found="none to read", remedy=remedy)
        ) from error
    if not isinstance(authority, ec.EllipticCurvePrivateKey) or authority.public_key() != ca.public_key():
        remedy = "bring back the ca.key that was made with this ca.crt"
        raise ConfigError(
            sentence(str(folder / "ca.key"), expected="the key of ca.crt", found="another", remedy=remedy)
        )
    _sign_server(folder, ca, authority, hosts or hosts_of(old), days)


def certificate(path: Path) -> x509.Certificate:
    """The certificate in a PEM file.

    Raises:
        ConfigError: there is none.
    """
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except (OSError, ValueError) as error:
        remedy = "name the folder that this command made"
        raise ConfigError(sentence(str(path), expected="a certificate", found="none to read", remedy=remedy)) from error


def hosts_of(leaf: x509.Certificate) -> list[str]:
    """The names and addresses that a server's certificate is valid for."""
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    addresses = names.get_values_for_type(x509.IPAddress)
    return [*names.get_values_for_type(x509.DNSName), *(str(address) for address in addresses)]


def days_left(found: x509.Certificate) -> float:
    """For how many more days a certificate is valid; negative once it is not."""
    return (found.not_valid_after_utc - datetime.now(UTC)).total_seconds() / 86400


def _sign_server(
    folder: Path, ca: x509.Certificate, authority: ec.EllipticCurvePrivateKey, hosts: Sequence[str], days: int
) -> None:
    key = ec.generate_private_key(ec.SECP384R1())
    valid_for = list(dict.fromkeys([*hosts, *LOOPBACK]))
    leaf = _certificate(_name(valid_for[0]), ca.subject, key.public_key(), authority.public_key(), days)
    leaf = leaf.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    leaf = leaf.add_extension(_usage(signs_certificates=False), critical=True)
    leaf = leaf.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
    leaf = leaf.add_extension(x509.SubjectAlternativeName(list(map(_alternative, valid_for))), critical=False)
    pem = leaf.sign(authority, hashes.SHA384()).public_bytes(serialization.Encoding.PEM)
    write_atomically(folder / "server.key", _private(key, serialization.PrivateFormat.PKCS8), 0o600)
    write_atomically(folder / "server.pem", pem, 0o644)


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
    return x509.IPAddress(ipaddress.ip_address(host)) if _is_address(host) else x509.DNSName(host)


def _is_address(host: str) -> bool:
    try:
        return bool(ipaddress.ip_address(host))
    except ValueError:
        return False


def _require_hosts(hosts: Sequence[str]) -> None:
    """Raises ConfigError where a host is not a plain name or address of at most 64 characters, a common name's most."""
    for host in hosts:
        name = re.fullmatch(r"[A-Za-z0-9.*_-]{1,64}", host)
        if not name and not _is_address(host):
            remedy = "write for example fed.example.org or 10.0.0.7, without https:// and without a port"
            raise ConfigError(sentence("host", expected="a name or an address", found=repr(host), remedy=remedy))


def _private(key: ec.EllipticCurvePrivateKey, form: serialization.PrivateFormat) -> bytes:
    return key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())


def _write(path: Path, data: bytes, mode: int) -> None:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        file.write(data)


def _unusable(folder: Path, found: str, remedy: str, expected: str = "a new or empty folder") -> ConfigError:
    return ConfigError(sentence(str(folder), expected=expected, found=found, remedy=remedy))


def _show(folder: Path) -> None:
    """Prints what the folder holds and for how long it is valid.

    Raises:
        FederationError: a certificate should be renewed.
    """
    soon = []
    for name in ("ca.crt", "server.pem"):
        found = certificate(folder / name)
        until = f"{found.not_valid_after_utc:%Y-%m-%d}, {days_left(found):.0f} days"
        hosts = f", for {', '.join(hosts_of(found))}" if name == "server.pem" else ""
        typer.echo(f"{name}: valid until {until}{hosts}")
        if days_left(found) < RENEW_DAYS:
            soon.append(name)
    for public in sorted(folder.glob("*.pub")):
        elsewhere = "" if public.with_suffix("").exists() else ", whose private half is elsewhere"
        typer.echo(f"{public.stem}: a node's key{elsewhere}")
    if soon:
        raise FederationError(
            sentence(
                soon[0], expected=f"{RENEW_DAYS} days or more", found="fewer", remedy="renew the server's with --renew"
            )
        )


def certificates(
    folder: Annotated[Path, typer.Argument(help="Where keys and certificates are or will be.", show_default=False)],
    host: Annotated[
        list[str] | None, typer.Option(help="A name or address of the SuperLink; give it once for each.")
    ] = None,
    nodes: Annotated[int, typer.Option(min=0, help="How many node keys to make.")] = 2,
    days: Annotated[int, typer.Option(min=1, max=825, help="How long the server's certificate is valid.")] = 90,
    add: Annotated[
        list[str] | None, typer.Option(metavar="NODE", help="Only make a key for one more node; may be given often.")
    ] = None,
    renew_: Annotated[bool, typer.Option("--renew", help="Only make a new certificate for the server.")] = False,
    show: Annotated[bool, typer.Option("--show", help="Only say what is there and until when it is valid.")] = False,
) -> None:
    """Make certificates for a SuperLink and keys for its SuperNodes."""
    if sum((bool(add), renew_, show)) > 1:
        remedy = "ask for one thing at a time"
        raise ConfigError(sentence("options", expected="one of --add, --renew, --show", found="more", remedy=remedy))
    if show:
        _show(folder)
    elif renew_:
        renew(folder, host or [], days)
    elif add:
        for name in add:
            add_node(folder, name)
    else:
        make_certificates(folder, host or list(LOOPBACK), nodes, days)


if __name__ == "__main__":
    script(certificates)
