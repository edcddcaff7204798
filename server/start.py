"""Starts the SuperLink of a federation and keeps it running: `python -m server.start --keys keys`.

TLS and the nodes' keys are on unless `--insecure` says otherwise, and only this machine may control it. Everything
that the server keeps is in one folder, `--home`: Flower's connections and apps, and the database of nodes and runs.
"""

from __future__ import annotations

import enum
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from fedpeft.cli import script
from fedpeft.engines.flower_environment import HOME_VARIABLE, flower_environment
from fedpeft.errors import ConfigError, sentence
from fedpeft.supervision import Child, keep_running
from server.connection import HOME, Connection, write_connection

CONTROL_VARIABLE = "FEDPEFT_CONTROL_FROM"
"""Names the networks from which the SuperLink may also be controlled; read by `fedpeft.engines.flower_superlink`."""

_EXPLANATIONS = {
    "address already in use": "another program uses the port",
    "Cannot assign requested address": "--host is no address of this machine",
    "SUPERLINK_DATABASE_SCHEMA_MISMATCH": "the database is from another version of Flower",
    "Exit Code: 105": "the database is from another version of Flower",
    "unable to open database file": "the database cannot be written",
    "KEY_VALUES_MISMATCH": "server.key is not the key of server.pem",
}


class Isolation(enum.StrEnum):
    """Where the app's server runs: started by the SuperLink, or beside it, so that it outlives a crash of it."""

    subprocess = "subprocess"
    process = "process"


@dataclass(frozen=True)
class Keys:
    """The certificate files of a SuperLink, all in one folder."""

    folder: Path

    @property
    def authority(self) -> Path:
        """The authority's certificate, which everybody gets."""
        return self.folder / "ca.crt"

    def require(self) -> None:
        """Raises ConfigError where a file is missing or cannot be read."""
        for name in ("ca.crt", "server.pem", "server.key"):
            if not os.access(self.folder / name, os.R_OK):
                remedy = f"make them with: python -m server.make_certificates {self.folder}"
                raise ConfigError(
                    sentence(f"--keys, {self.folder / name}", expected="a file", found="none to read", remedy=remedy)
                )


@dataclass(frozen=True)
class SuperLink:
    """How a SuperLink is started; `keys` None is without TLS and without keys of nodes."""

    home: Path
    host: str
    port: int
    keys: Keys | None
    isolation: Isolation = Isolation.subprocess

    @property
    def local_address(self) -> str:
        """Where this machine reaches it."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"[{host}]:{self.port}" if ":" in host else f"{host}:{self.port}"

    def children(self) -> tuple[Child, ...]:
        """The processes to keep running."""
        line = (
            *(sys.executable, "-m", "fedpeft.engines.flower_superlink"),
            *("--host", self.host, "--port", str(self.port)),
            *("--database", str(self.home.absolute() / "state.db"), "--isolation", self.isolation.value),
            *self._identity(),
        )
        superlink = Child("superlink", line, explain)
        if self.isolation is Isolation.subprocess:
            return (superlink,)
        trust = ("--insecure",) if self.keys is None else ("--root-certificates", str(self.keys.authority.absolute()))
        executor = ("flower-superexec", "--runtime-api-address", self.local_address, *trust)
        return superlink, Child("executor", executor)

    def _identity(self) -> tuple[str, ...]:
        if self.keys is None:
            return ("--insecure",)
        folder = self.keys.folder.absolute()
        return (
            *("--ssl-ca-certfile", str(folder / "ca.crt"), "--ssl-certfile", str(folder / "server.pem")),
            *("--ssl-keyfile", str(folder / "server.key"), "--enable-supernode-auth"),
        )


def explain(line: str) -> str:
    """What a line that the SuperLink prints tells an operator about its end."""
    return next((meaning for mark, meaning in _EXPLANATIONS.items() if mark in line), "")


def say(text: str) -> None:
    """Prints a line of ours among Flower's."""
    typer.echo(f"fedpeft: {text}")


def start(
    home: Annotated[Path, typer.Option(envvar=HOME_VARIABLE, help="Where the server keeps everything.")] = HOME,
    keys: Annotated[Path, typer.Option(help="The folder that server.make_certificates made.")] = Path("keys"),
    host: Annotated[str, typer.Option(help="The address to listen on; 0.0.0.0 is every one.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="The port to listen on.")] = 46000,
    name: Annotated[str, typer.Option(help="What `flwr run . NAME` calls this federation.")] = "lab",
    isolation: Annotated[
        Isolation, typer.Option(help="process: a run survives a crash of the SuperLink.")
    ] = Isolation.subprocess,
    control_from: Annotated[
        list[str] | None,
        typer.Option(metavar="NETWORK", help="Also let this network control it, such as 10.0.7.0/24."),
    ] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="No TLS, and any node may join: for trials on one machine.")
    ] = False,
) -> None:
    """Start the SuperLink, write its connection for `flwr`, and start it again whenever it ends, until stopped."""
    superlink = SuperLink(home, host, port, None if insecure else Keys(keys), isolation)
    prepare(superlink, name, say)
    env = flower_environment(home, {**os.environ, CONTROL_VARIABLE: " ".join(control_from or [])})
    keep_running(superlink.children(), env, say)


def prepare(superlink: SuperLink, name: str, tell: Callable[[str], None]) -> None:
    """The home folder is there, closed to others, and its `config.toml` names the connection.

    Raises:
        ConfigError: keys are missing, or the folder cannot be used.
    """
    if superlink.keys is not None:
        superlink.keys.require()
    _require_outside(superlink.home)
    try:
        superlink.home.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        found = (error.strerror or str(error)).lower()
        remedy = "name another folder"
        raise ConfigError(
            sentence(f"--home, {superlink.home}", expected="a folder", found=found, remedy=remedy)
        ) from error
    os.umask(0o077)
    authority = None if superlink.keys is None else superlink.keys.authority
    path = write_connection(Connection(name, superlink.local_address, authority), superlink.home)
    if superlink.keys is None:
        tell("--insecure: nothing is encrypted, and any node may join")
    tell(
        f"{name} is {superlink.local_address} in {path}; to use it: export {HOME_VARIABLE}={superlink.home.absolute()}"
    )


def _require_outside(home: Path) -> None:
    """Raises ConfigError where `home` is in a project: a run sends the files of its project to every node."""
    for parent in home.absolute().parents:
        if (parent / "pyproject.toml").exists():
            place, remedy = f"--home, {home}", "name a folder elsewhere, such as ~/federation"
            expected = "a folder outside any project, whose files each run sends to the nodes"
            raise ConfigError(sentence(place, expected=expected, found=f"one in {parent}", remedy=remedy))


if __name__ == "__main__":
    script(start)
