"""Which nodes may join: `python -m server.nodes add keys/node-0.pub`, `... list`, `... remove node-0`.

A node joins with its private key, of which the server knows the public half. Flower knows nodes by random numbers
alone; which key has which number is noted here in `nodes.json` of the server's home folder. The SuperLink must run.
"""

from __future__ import annotations

import base64
import enum
import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_public_key

from fedpeft.cli import script
from fedpeft.engines.flower_environment import HOME_VARIABLE, flower_environment
from fedpeft.errors import ConfigError, FederationError, sentence
from fedpeft.files import write_atomically
from server.connection import HOME
from server.flwr_calls import Flwr

_FLWR_SECONDS = 60.0


class Action(enum.StrEnum):
    """What is asked of the list of nodes."""

    add = "add"
    list = "list"
    remove = "remove"


@dataclass(frozen=True)
class Node:
    """A registered node: Flower's number of it, the name of its key's file, and the key's fingerprint."""

    id: str
    name: str
    fingerprint: str


@dataclass(frozen=True)
class Register:
    """The nodes of the SuperLink that `flwr` calls `connection`, with the notes of them in `home`."""

    home: Path
    connection: str

    @property
    def notes(self) -> tuple[Node, ...]:
        """The nodes that were added here.

        Raises:
            ConfigError: the notes cannot be read.
        """
        try:
            return tuple(Node(**entry) for entry in json.loads(self._path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return ()
        except (OSError, ValueError, TypeError) as error:
            remedy = "move it away; nodes can still be removed by their number"
            raise ConfigError(
                sentence(str(self._path), expected="the notes of nodes", found=str(error), remedy=remedy)
            ) from error

    def add(self, key: Path) -> Node:
        """The node with the public key in the file `key` may join.

        Raises:
            ConfigError: the file holds no public key that Flower takes, or a key of that name is registered.
            FederationError: the SuperLink refused, or cannot be reached.
        """
        known, name, found = self.notes, key.stem, fingerprint(key)
        for node in known:
            if name == node.name or found == node.fingerprint:
                remedy = f"remove that one first with: python -m server.nodes remove {node.name}"
                raise ConfigError(
                    sentence(str(key), expected="a new key", found=f"that {node.name} is registered", remedy=remedy)
                )
        answer = self._flwr("register", str(key.absolute()), self.connection)
        node = Node(str(answer["node-id"]), name, found)
        self._write((*known, node))
        return node

    def remove(self, which: str) -> Node:
        """The node that has the name or the number `which` may join no more; it is gone at its next message.

        Raises:
            ConfigError: there is no such node.
            FederationError: the SuperLink refused, or cannot be reached.
        """
        known = self.notes
        node = next((node for node in known if which in (node.name, node.id)), Node(which, "", ""))
        if not node.id.isdigit():
            names = ", ".join(node.name for node in known) or "none"
            raise ConfigError(
                sentence("remove", expected=f"one of {names}, or a number", found=repr(which), remedy="see: list")
            )
        self._flwr("unregister", node.id, self.connection)
        self._write(tuple(other for other in known if other != node))
        return node

    def list(self) -> tuple[tuple[str, str, str], ...]:
        """Name, number and state of each node that may join.

        Raises:
            FederationError: the SuperLink cannot be reached.
        """
        names = {node.id: node.name for node in self.notes}
        found = self._flwr("list", self.connection)["nodes"]
        here = [entry for entry in found if entry["status"] not in ("unregistered", "deleted")]
        return tuple((names.get(entry["node-id"], "?"), entry["node-id"], _state(entry)) for entry in here)

    @property
    def _path(self) -> Path:
        return self.home / "nodes.json"

    def _write(self, nodes: tuple[Node, ...]) -> None:
        text = json.dumps([asdict(node) for node in nodes], indent=2)
        write_atomically(self._path, f"{text}\n".encode(), 0o600)

    def _flwr(self, *arguments: str) -> dict[str, Any]:
        """What `flwr supernode` answers, as JSON."""
        flwr = Flwr(flower_environment(self.home, os.environ), _FLWR_SECONDS)
        answer = flwr.answer("supernode", *arguments)
        if not answer.get("success"):
            raise self._refused(arguments[0], str(answer.get("error-message", "no reason")))
        return answer

    def _refused(self, what: str, why: str) -> FederationError:
        lines = [line for line in why.splitlines() if "Using SuperLink" not in line and "Listing" not in line]
        found = " ".join(" ".join(lines).split()).removeprefix("Error: ").rstrip(".")
        remedy = f"see that the server of {self.connection!r} runs and that --home is its home folder"
        return FederationError(sentence(what, expected="the SuperLink's consent", found=found[:300], remedy=remedy))


def fingerprint(key: Path) -> str:
    """The SHA-256 of a public key, as `ssh-keygen -l` prints it.

    Raises:
        ConfigError: the file holds no public key of the kind that Flower takes.
    """
    try:
        data = key.read_bytes()
        public = load_ssh_public_key(data)
    except OSError as error:
        raise _no_key(key, (error.strerror or str(error)).lower()) from error
    except (ValueError, UnsupportedAlgorithm) as error:
        private = b"PRIVATE KEY" in data
        raise _no_key(key, "a private key, which stays with its node" if private else "none") from error
    if not isinstance(public, ec.EllipticCurvePublicKey):
        raise _no_key(key, type(public).__name__.strip("_"))
    digest = hashlib.sha256(base64.b64decode(data.split()[1])).digest()
    return f"SHA256:{base64.b64encode(digest).decode().rstrip('=')}"


def _no_key(key: Path, found: str) -> ConfigError:
    remedy = "name a .pub file that server.make_certificates made"
    return ConfigError(sentence(str(key), expected="an ECDSA public key (P-384)", found=found, remedy=remedy))


def _state(entry: dict[str, Any]) -> str:
    since = {"online": "online-at", "offline": "offline-at"}.get(entry["status"])
    return f"{entry['status']} since {entry[since]}" if since else str(entry["status"])


def nodes(
    action: Annotated[Action, typer.Argument(help="What to do.", show_default=False)],
    which: Annotated[
        str, typer.Argument(help="add: a file NODE.pub; remove: a node's name or number.", show_default=False)
    ] = "",
    home: Annotated[Path, typer.Option(envvar=HOME_VARIABLE, help="The server's home folder.")] = HOME,
    name: Annotated[str, typer.Option(help="What the federation is called.")] = "lab",
) -> None:
    """Register the public keys of nodes, list the nodes, and take a node's right to join away."""
    register = Register(home, name)
    if not (home / "config.toml").exists():
        remedy = "name it with --home, or start the server first with: python -m server.start"
        raise ConfigError(sentence(f"--home, {home}", expected="a server's home folder", found="none", remedy=remedy))
    if action is Action.list:
        for row in register.list():
            typer.echo("  ".join(row))
        return
    if not which:
        raise ConfigError(
            sentence(action.value, expected="a node", found="none named", remedy="name a key's file, or a node")
        )
    node = register.add(Path(which)) if action is Action.add else register.remove(which)
    done = "may join" if action is Action.add else "may join no more"
    typer.echo(f"{node.name or 'the node'} ({node.id}) {done}")


if __name__ == "__main__":
    script(nodes)
