"""Whether the server answers, for a container's health check: `python -m server.health --keys keys`.

Exits with 0 where it does. The certificate is checked as a node checks it.
"""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Annotated

import typer

from fedpeft.cli import script
from fedpeft.errors import ConfigError, sentence
from fedpeft.supervision import require_well


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
    require_well(f"{'http' if insecure else 'https'}://{address}/health", "a server", context)
    typer.echo(f"{address}: well")


if __name__ == "__main__":
    script(health)
