"""Starts a node and keeps it running: `python -m clients.start node.toml`.

The node's file (`fedpeft.config.node`) says where the server is and by which key the node is known to it. A node
whose server is away, or which the server does not take back yet, tries again and again, with growing pauses.
"""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path
from typing import Annotated

import typer

from fedpeft.assets import cache_folder
from fedpeft.cli import script
from fedpeft.config.node import NodeConfig, load_node
from fedpeft.engines.flower_environment import HOME_VARIABLE, flower_environment
from fedpeft.errors import ConfigError, sentence
from fedpeft.supervision import Child, Pauses, keep_running

NODE_VARIABLE = "FEDPEFT_NODE"
"""Names the node's file for the app that runs on the node."""

PAUSES = Pauses(first=2.0, most=15.0, steady=60.0)
"""A server forgets a node that was killed after about a minute; until then it refuses the key."""

_EXPLANATIONS = {
    "[code: 2004]": "the server does not take this key now: it is not registered there, or the server still believes "
    "the node connected, which it does for up to a minute after a crash",
    "SSL/TLS handshake error": "no TLS connection to the server could be made",
    "CERTIFICATE_VERIFY_FAILED": "the server's certificate is not from the authority in server.root_certificates, or "
    "not for the name in server.address, or no longer valid",
    "UNEXPECTED_EOF": "the connection was cut before it was made: something answers at server.address, but no server",
    "WRONG_VERSION_NUMBER": "what answers at server.address speaks no TLS",
    "has left its server": "the connection to the server was lost",
    "401 Unauthorized": "the server does not know this node's key, or the clocks of the two are minutes apart",
    "RUNTIME_VERSION": "the server has another version of Flower",
    "Exit Code: 606": "the server has another version of Flower",
    "Exit Code: 302": "server.private_key holds no ECDSA private key",
    "address already in use": "another program uses the node's own port",
}


def warm_command(node: NodeConfig, file: Path, app: str) -> tuple[str, ...]:
    """The command line of a node that keeps the base in memory, and runs the installed `app` alone.

    Raises:
        ConfigError: TLS or a key is missing where the node's file does not say `insecure`, or a file cannot be read.
    """
    _identity(node)
    return (sys.executable, "-m", "fedpeft", "node", str(file.absolute()), *(("--app", app) if app else ()))


def command(node: NodeConfig) -> tuple[str, ...]:
    """The command line of Flower's own SuperNode for the node.

    Raises:
        ConfigError: TLS or a key is missing where the node's file does not say `insecure`, or a file cannot be read.
    """
    config = f"partition-id={node.partition}" + (f" rank={node.rank}" if node.rank else "")
    port = node.port or _free_port()
    line = (
        *(sys.executable, "-m", "fedpeft.engines.flower_supernode", "--superlink", node.server.address),
        *("--host", "127.0.0.1", "--port", str(port), "--node-config", config),
    )
    trusted = ("--trusted-entities", node.server.trusted_entities) if node.server.trusted_entities else ()
    return (*line, *_identity(node), *trusted)


def explain(line: str) -> str:
    """What a line that the SuperNode prints tells an operator about its end."""
    return next((meaning for mark, meaning in _EXPLANATIONS.items() if mark in line), "")


def say(text: str) -> None:
    """Prints a line of ours among Flower's."""
    typer.echo(f"fedpeft: {text}")


def start(
    node: Annotated[Path, typer.Argument(help="The node's settings, a TOML file.", show_default=False)],
    home: Annotated[
        Path | None,
        typer.Option(envvar=HOME_VARIABLE, help="Flower's own folder on this node.", show_default="in the cache"),
    ] = None,
    app: Annotated[
        str, typer.Option(metavar="MODULE:NAME", help="The site's Flower client; empty for fedpeft's own.")
    ] = "clients.app:app",
    supernode: Annotated[
        bool,
        typer.Option("--supernode", help="Flower's own SuperNode, which runs the app that the server sends, cold."),
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the command line that would run, and end.")] = False,
) -> None:
    """Start the node, and start it again whenever it ends, until this command is stopped."""
    settings = load_node(node)
    line = command(settings) if supernode else warm_command(settings, node, app)
    if dry_run:
        typer.echo(" ".join(line))
        return
    env = flower_environment(home or cache_folder() / "flower", {**os.environ, NODE_VARIABLE: str(node.absolute())})
    if settings.server.insecure:
        say("insecure: nothing is encrypted, and nobody knows who is who")
    say(f"partition {settings.partition} joins {settings.server.address}")
    keep_running([Child("node", line, explain)], env, say, PAUSES)


def _identity(node: NodeConfig) -> tuple[str, ...]:
    server = node.server
    if server.insecure:
        return ("--insecure",)
    for key in ("root_certificates", "private_key", *(("trusted_entities",) if server.trusted_entities else ())):
        path = getattr(server, key)
        if not path or not os.path.isfile(path) or not os.access(path, os.R_OK):
            remedy = "name the file in the node's settings; only a trial on one machine may say insecure = true"
            found = f"none to read at {path}" if path else "none named"
            raise ConfigError(sentence(f"server.{key}", expected="a file", found=found, remedy=remedy))
    return ("--root-certificates", server.root_certificates, "--auth-supernode-private-key", server.private_key)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    script(start)
