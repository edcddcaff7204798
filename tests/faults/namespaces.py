"""A server and two nodes in networks of their own, joined by links that can be taken down."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

SERVER_ADDRESS = "10.71.0.1"
"""The server's address; it is there inside the namespaces alone."""


@dataclass(frozen=True)
class LinkLine:
    """A way by a virtual cable from the namespace `node` to the server's; cut at both ends, packets are lost."""

    server: str
    node: str
    port: int

    @property
    def within(self) -> tuple[str, ...]:
        return ("ip", "netns", "exec", self.node)

    @property
    def address(self) -> str:
        return f"{SERVER_ADDRESS}:{self.port}"

    def cut(self) -> None:
        self._set("down")

    def mend(self) -> None:
        self._set("up")

    def _set(self, state: str) -> None:
        _ip("-n", self.server, "link", "set", self.node, state)
        _ip("-n", self.node, "link", "set", "up0", state)


def possible() -> bool:
    """Whether this process may make network namespaces."""
    name = f"fp{os.getpid()}t"
    if not shutil.which("ip") or _ip("netns", "add", name, check=False):
        return False
    _ip("netns", "del", name)
    return True


@contextlib.contextmanager
def links(count: int, port: int) -> Iterator[tuple[tuple[str, ...], tuple[LinkLine, ...]]]:
    """What a server's commands begin with so that it is in a namespace of its own, and the ways of `count` nodes to it.

    All ends are on one bridge, which has the server's address.
    """
    server = f"fp{os.getpid()}s"
    nodes = [f"fp{os.getpid()}n{number}" for number in range(count)]
    with contextlib.ExitStack() as stack:
        for name in (server, *nodes):
            _ip("netns", "add", name)
            stack.callback(_ip, "netns", "del", name)
            _ip("-n", name, "link", "set", "lo", "up")
        _ip("-n", server, "link", "add", "br0", "type", "bridge")
        _ip("-n", server, "address", "add", f"{SERVER_ADDRESS}/24", "dev", "br0")
        _ip("-n", server, "link", "set", "br0", "up")
        for number, name in enumerate(nodes):
            _ip("-n", server, "link", "add", name, "type", "veth", "peer", "name", "up0", "netns", name)
            _ip("-n", server, "link", "set", name, "master", "br0", "up")
            _ip("-n", name, "address", "add", f"10.71.0.{number + 2}/24", "dev", "up0")
            _ip("-n", name, "link", "set", "up0", "up")
        yield ("ip", "netns", "exec", server), tuple(LinkLine(server, name, port) for name in nodes)


def _ip(*arguments: str, check: bool = True) -> int:
    """The exit status of `ip`."""
    done = subprocess.run(("ip", *arguments), capture_output=True, text=True, check=False)
    assert not check or done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr}"
    return done.returncode
