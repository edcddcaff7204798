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


@dataclass(frozen=True)
class Federation:
    """A server's port and folder; certificates and keys are in `keys`, logs beside them."""

    lab: Lab
    port: int

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
        return processes.run(line(module, *arguments), self.lab.env, self.lab.app)

    def refused(self, module: str, *arguments: object) -> str:
        """The one line on stderr of a script that must refuse."""
        done = subprocess.run(
            line(module, *arguments),
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
        asked = line("server.start", "--keys", self.keys, "--port", self.port, "--name", NAME, *more)
        with processes.started(asked, self.lab.env, self.lab.app, log) as process:
            processes.until(lambda: processes.listening(self.port), 60, "server", log)
            yield process

    @contextlib.contextmanager
    def node(
        self, name: str, number: int, server_port: int, *, warm: bool = False, **paths: Path
    ) -> Iterator[subprocess.Popen[bytes]]:
        """The node `name` of partition `number` runs inside, with the certificate and key of that name or `paths`.

        It is Flower's SuperNode, with a rank of its own, or `warm` fedpeft's node, at any rank.
        """
        file = self.lab.root / f"{name}.toml"
        ca, key = paths.get("ca", self.keys / "ca.crt"), paths.get("key", self.keys / name)
        (port,) = processes.free_ports(1)
        file.write_text(
            f"partition = {number}\nrank = {0 if warm else rank(number)}\nport = {port}\n\n"
            f'[server]\naddress = "127.0.0.1:{server_port}"\n'
            f'root_certificates = "{ca}"\nprivate_key = "{key}"\n'
        )
        env = {**self.lab.env, "FLWR_HOME": str(self.lab.root / f"flwr-{name}")}
        with processes.started(
            line("clients.start", file, *(() if warm else ("--supernode",))), env, self.lab.app, self.log(name)
        ) as process:
            yield process

    def said(self, name: str, text: str) -> bool | None:
        """True once `text` stands in the log of `name`."""
        return True if text in self.log(name).read_text(errors="replace") else None

    def joined(self, *names: str) -> bool | None:
        """True once all the nodes `names` are online."""
        states = self.states()
        return True if all(states.get(name) == "online" for name in names) else None


def rank(number: int) -> int:
    """The rank of the node of a partition: no two have the same."""
    return 32 * 2**number


def line(module: str, *arguments: object) -> list[str]:
    return [sys.executable, "-m", module, *map(str, arguments)]


def own_process(log: Path, name: str) -> int:
    """The number of the process that a script's log named last."""
    found = [row for row in log.read_text(errors="replace").splitlines() if f"fedpeft: {name}: started, process" in row]
    return int(found[-1].split()[-1])
