"""Whether the server answers, for a container's health check: `python -m server.health --keys keys`.

Exits with 0 where it does. The certificate is checked as a node checks it.
"""

from __future__ import annotations

import ssl
import urllib.error
import urllib.request
from pathlib import Path
from typing import Annotated

import typer

from fedpeft.cli import script
from fedpeft.errors import ConfigError, FederationError, sentence

_SECONDS = 5.0


def health(
    keys: Annotated[Path, typer.Option(help="The folder that server.make_certificates made.")] = Path("keys"),
    port: Annotated[int, typer.Option(min=1, max=65535, help="The server's port.")] = 46000,
    host: Annotated[str, typer.Option(help="The server's name or address.")] = "127.0.0.1",
    insecure: Annotated[bool, typer.Option("--insecure", help="The server runs without TLS.")] = False,
) -> None:
    """Ask the server whether it is well."""
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        context = None if insecure else ssl.create_default_context(cafile=str(keys / "ca.crt"))
    except OSError as error:
        remedy = "name the folder of the keys"
        raise ConfigError(
            sentence(str(keys / "ca.crt"), expected="a certificate", found=str(error), remedy=remedy)
        ) from error
    try:
        url = f"{'http' if insecure else 'https'}://{address}/health"
        with urllib.request.urlopen(url, timeout=_SECONDS, context=context):
            typer.echo(f"{address}: well")
    except (urllib.error.URLError, OSError) as error:
        found = getattr(error, "reason", error)
        raise FederationError(
            sentence(address, expected="a server that answers", found=found, remedy="see its log")
        ) from error


if __name__ == "__main__":
    script(health)
