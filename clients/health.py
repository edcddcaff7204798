"""Whether a node's own process answers, for a container's health check: `python -m clients.health node.toml`.

Exits with 0 where it does. Whether the server takes the node is another question, which the node's log answers.
"""

from __future__ import annotations

import urllib.error
import urllib.request
from pathlib import Path
from typing import Annotated

import typer

from fedpeft.cli import script
from fedpeft.config.node import load_node
from fedpeft.errors import FederationError, sentence

_SECONDS = 5.0


def health(node: Annotated[Path, typer.Argument(help="The node's settings, a TOML file.", show_default=False)]) -> None:
    """Ask the node's own process whether it is well."""
    address = f"127.0.0.1:{load_node(node).port}"
    try:
        with urllib.request.urlopen(f"http://{address}/health", timeout=_SECONDS):
            typer.echo(f"{address}: well")
    except (urllib.error.URLError, OSError) as error:
        found = getattr(error, "reason", error)
        raise FederationError(
            sentence(address, expected="a node that answers", found=found, remedy="see its log")
        ) from error


if __name__ == "__main__":
    script(health)
