"""A federation on this machine, started as an operator starts one: by the project's own scripts."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.engines import processes
from tests.engines.lab import Lab

NAME = "lab"
JOINED = "connected as node"
"""What fedpeft's node says once the server has taken it."""

BEATS = 10
"""Seconds between two signs of life of a node: the fewest that Flower takes, so that nobody waits long for its end."""


@dataclass(frozen=True)
class Federation:
    """A server's address and folder; certificates and keys are in `keys`, logs beside them.

    Its scripts are started by `within`, which may put them into a network of their own.
    """

    lab: Lab
    port: int
    host: str = "127.0.0.1"
    within: tuple[str, ...] = ()

    @property
    def keys(self) -> Path:
        return self.lab.root / "keys"

    @property
    def home(self) -> Path:
        return self.lab.root / "flwr"

    def log(self, name: str) -> Path:
        return self.lab.root / f"{name}.log"

    def script(self, module: str, *arguments: object) -> str:
        """What one of the project's scripts prints."""
        return processes.run([*self.within, *line(module, *arguments)], self.lab.env, self.lab.app)

    def refused(self, module: str, *arguments: object) -> str:
        """The one line on stderr of a script that must refuse."""
        done = subprocess.run(
            [*self.within, *line(module, *arguments)],
            env=self.lab.env,
            cwd=self.lab.app,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode in (1, 2), done.stdout
        assert len(done.stderr.splitlines()) == 1, done.stderr
        return done.stderr

    def states(self) -> dict[str, str]:
        """The state of each node by its name."""
        rows = [row.split() for row in self.script("server.nodes", "list").splitlines()]
        return {row[0]: row[2] for row in rows}

    @contextlib.contextmanager
    def server(self, *more: object) -> Iterator[subprocess.Popen[bytes]]:
        """The server runs inside, and is reachable."""
        log = self.log("server")
        where = ("--keys", self.keys, "--host", self.host, "--port", self.port, "--name", NAME)
        asked = [*self.within, *line("server.start", *where, *more)]
        with processes.started(asked, self.lab.env, self.lab.app, log) as process:
            processes.until(self.up, 60, "server", log)
            yield process

    def up(self) -> bool | None:
        """True once the server can be reached."""
        if not self.within:
            return processes.listening(self.port)
        probe = f"import socket; socket.create_connection(({self.host!r}, {self.port}), 1)"
        return subprocess.run([*self.within, sys.executable, "-c", probe], capture_output=True).returncode == 0 or None

    @contextlib.contextmanager
    def node(
        self,
        name: str,
        number: int,
        address: str,
        *,
        profile: str = "",
        command: tuple[str, ...] | None = None,
        **paths: Path,
    ) -> Iterator[subprocess.Popen[bytes]]:
        """The node `name` of partition `number` runs inside and reaches the server at `address`.

        It has the certificate and key of its name, or `paths`, knows the others' public keys, and is started by
        `clients.start`, or by `command`, which takes its file.
        """
        file = self.lab.root / f"{name}.toml"
        ca, key = paths.get("ca", self.keys / "ca.crt"), paths.get("key", self.keys / name)
        file.write_text(
            f'partition = {number}\nport = 0\nprofile = "{profile}"\npeers = "{self.keys}"\n\n'
            f'[model]\ndevice = "cpu"\n\n'
            f'[server]\naddress = "{address}"\nroot_certificates = "{ca}"\nprivate_key = "{key}"\n'
            f"heartbeat_seconds = {BEATS}\n"
        )
        env = {**self.lab.env, "FLWR_HOME": str(self.lab.root / f"flwr-{name}")}
        asked = [*(command or line("clients.start")), str(file)]
        with processes.started(asked, env, self.lab.app, self.log(name)) as process:
            yield process

    def said(self, name: str, text: str) -> bool | None:
        """True once `text` stands in the log of `name`."""
        return True if text in self.log(name).read_text(errors="replace") else None

    def wait_for(self, *names: str, times: int = 1) -> None:
        """The nodes `names`, all of fedpeft's own kind, have joined as often as that since they were started."""

        def joined() -> bool | None:
            said = [self.log(name).read_text(errors="replace").count(JOINED) for name in names]
            return True if min(said) >= times else None

        processes.until(joined, 200, "nodes online", *map(self.log, names))


def line(module: str, *arguments: object) -> list[str]:
    return [sys.executable, "-m", module, *map(str, arguments)]


def own_process(log: Path, name: str) -> int:
    """The number of the process that a script's log named last."""
    found = [row for row in log.read_text(errors="replace").splitlines() if f"fedpeft: {name}: started, process" in row]
    return int(found[-1].split()[-1])
