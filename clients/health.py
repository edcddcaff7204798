"""Whether a node's own process answers, for a container's health check: `python -m clients.health node.toml`.

Exits with 0 where it does. Whether the server takes the node is another question, which the node's log answers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedpeft.cli import script
from fedpeft.config.node import load_node
from fedpeft.supervision import require_well


def health(node: Annotated[Path, typer.Argument(help="The node's settings, a TOML file.", show_default=False)]) -> None:
    """Ask the node's own process whether it is well."""
    address = f"127.0.0.1:{load_node(node).port}"
    require_well(f"http://{address}/health", "a node")
    typer.echo(f"{address}: well")


if __name__ == "__main__":
    script(health)
