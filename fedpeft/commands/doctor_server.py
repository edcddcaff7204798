"""The checks of `fedpeft doctor` that concern the server: reached, known, on time, and the key that it is shown."""

from __future__ import annotations

import http.client
import socket
import ssl
import stat
from collections.abc import Iterator
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path

from cryptography import x509

from fedpeft.commands.checks import Check, failed, ok, skipped, warning
from fedpeft.config.node import ServerConfig
from fedpeft.errors import ConfigError
from fedpeft.node_key import private_key

SECONDS = 5.0
"""How long the server may take to answer each time."""

MOST_SKEW_SECONDS = 60.0
"""How far the clocks of node and server may be apart."""

LEAST_DAYS = 14
"""A certificate that ends sooner is warned of."""


def server_checks(server: ServerConfig, now: datetime | None = None) -> Iterator[Check]:
    """Every check of the server and of what the node shows it; nothing but its own address is asked."""
    at = now or datetime.now(UTC)
    reached = _reached(server)
    yield reached
    up = reached.outcome != "FAILED"
    if server.insecure:
        yield warning("certificate", "insecure: anybody between can read and change what is sent", "use TLS")
    else:
        yield from _roots(server, at)
        yield _certificate(server, at) if up else skipped("certificate", "the server cannot be reached")
    yield _clock(server, at) if up else skipped("clock", "the server cannot be reached")
    yield _key(server)


def _reached(server: ServerConfig) -> Check:
    try:
        socket.create_connection((server.host, server.port), SECONDS).close()
    except socket.gaierror as error:
        return failed("server", f"no address for {server.host}: {error.strerror}", "correct server.address")
    except OSError as error:
        return failed(
            "server",
            f"no answer at {server.address}: {error.strerror or error}",
            "start the server, correct server.address, or let the port through the firewall",
        )
    return ok("server", f"{server.address} answers")


def _roots(server: ServerConfig, now: datetime) -> Iterator[Check]:
    """The authority's own certificate, where the node has one."""
    if not server.root_certificates:
        yield warning(
            "root certificates",
            "none named, so every authority that this machine knows is trusted",
            "set server.root_certificates",
        )
        return
    try:
        found = x509.load_pem_x509_certificates(Path(server.root_certificates).read_bytes())
    except OSError as error:
        yield failed("root certificates", f"{server.root_certificates}: {error.strerror}", "copy ca.crt to this node")
        return
    except ValueError:
        yield failed("root certificates", f"{server.root_certificates} is no PEM certificate", "copy ca.crt anew")
        return
    yield _lasting("root certificates", min(each.not_valid_after_utc for each in found), now)


def _lasting(name: str, end: datetime, now: datetime) -> Check:
    days = (end - now).total_seconds() / 86400
    until = f"valid until {end:%Y-%m-%d}"
    if days < 0:
        return failed(name, f"not valid since {end:%Y-%m-%d}", "have it renewed by who runs the server")
    if days < LEAST_DAYS:
        return warning(name, f"{until}, {days:.0f} days", "have it renewed by who runs the server")
    return ok(name, until)


def _certificate(server: ServerConfig, now: datetime) -> Check:
    """What the server shows: signed by the node's authority, for this host, not ended."""
    try:
        context = ssl.create_default_context(cafile=server.root_certificates or None)
        with _shaken(server, context) as shaken:
            shown = shaken.getpeercert() or {}
    except ssl.SSLCertVerificationError as error:
        return failed("certificate", error.verify_message.rstrip("."), _remedy(error.verify_message))
    except ssl.SSLError as error:
        return failed("certificate", f"no TLS: {error.reason or error}", "ask who runs the server whether it has TLS")
    except OSError as error:
        return failed(
            "certificate", f"no TLS: {error.strerror or error}", "mend server.root_certificates or the server"
        )
    end = datetime.fromtimestamp(ssl.cert_time_to_seconds(str(shown["notAfter"])), UTC)
    return _lasting("certificate", end, now)


def _remedy(message: str) -> str:
    """What mends a certificate that is refused, by what OpenSSL says of it."""
    remedies = {
        "expired": "have it renewed by who runs the server, and set this node's clock",
        "not yet valid": "set this node's clock",
        "mismatch": "correct server.address, or have the certificate made for this name too",
        "not valid for": "correct server.address, or have the certificate made for this name too",
        "issuer": "name the authority that signed it in server.root_certificates",
        "self-signed": "name the authority that signed it in server.root_certificates",
        "signature": "name the authority that signed it in server.root_certificates",
    }
    return next((remedy for part, remedy in remedies.items() if part in message), "ask who runs the server")


def _shaken(server: ServerConfig, context: ssl.SSLContext) -> ssl.SSLSocket:
    plain = socket.create_connection((server.host, server.port), SECONDS)
    try:
        return context.wrap_socket(plain, server_hostname=server.host)
    except BaseException:
        plain.close()
        raise


def _clock(server: ServerConfig, now: datetime) -> Check:
    """The server's clock as its answer's Date header tells it; the certificate is judged elsewhere, nothing is sent."""
    unchecked = ssl.create_default_context()
    unchecked.check_hostname, unchecked.verify_mode = False, ssl.CERT_NONE
    connection = (
        http.client.HTTPConnection(server.host, server.port, timeout=SECONDS)
        if server.insecure
        else http.client.HTTPSConnection(server.host, server.port, timeout=SECONDS, context=unchecked)
    )
    try:
        connection.request("HEAD", "/")
        told = parsedate_to_datetime(connection.getresponse().getheader("Date") or "")
    except (OSError, http.client.HTTPException, ValueError):
        return skipped("clock", "the server does not tell its time")
    finally:
        connection.close()
    skew = (now - told.astimezone(UTC)).total_seconds()
    if abs(skew) > MOST_SKEW_SECONDS:
        side = "ahead of" if skew > 0 else "behind"
        return failed("clock", f"{abs(skew):.0f} seconds {side} the server's", "set this node's clock (NTP)")
    return ok("clock", f"{abs(skew):.0f} seconds from the server's")


def _key(server: ServerConfig) -> Check:
    """The node's own key: there, of the kind that Flower wants, and readable by its owner alone."""
    path = Path(server.private_key)
    if not server.private_key:
        return warning(
            "private key",
            "none named, so the server cannot tell this node from others",
            "have one made: python -m server.make_certificates",
        )
    try:
        private_key(path)
        mode = stat.S_IMODE(path.stat().st_mode)
    except ConfigError as error:
        what, _, remedy = str(error).rpartition("; ")
        return failed("private key", what, remedy.rstrip("."))
    if mode & 0o077:
        return failed("private key", f"{path} can be read by others ({mode:04o})", f"chmod 600 {path}")
    return ok("private key", "ECDSA P-384, readable by its owner alone")
