"""Flower's SuperLink, whose control is out of reach of other machines: `python -m fedpeft.engines.flower_superlink`.

Flower 1.41 answers on one port to nodes, to the operator and to the app's own processes, and asks nobody but nodes
for a key: whoever reaches the port could register nodes of his own, and start runs, whose code every node executes.
Here a request from another machine gets no further than what nodes need, unless it comes from a network that
`FEDPEFT_CONTROL_FROM` names.
"""

from __future__ import annotations

import ipaddress
import os
import sys
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from flwr.superlink import extensions
from flwr.superlink.cli.flower_superlink import flower_superlink
from starlette.middleware import Middleware

from fedpeft.errors import ConfigError, sentence

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Scope]]
Send = Callable[[Scope], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

CONTROL_VARIABLE = "FEDPEFT_CONTROL_FROM"
"""Names the networks, separated by spaces, from which the SuperLink may also be controlled."""

_OPEN_PREFIX, _OPEN_PATH = "/v1/fleet/", "/health"
_FORBIDDEN = b"This address serves nodes alone; control the SuperLink from its own machine.\n"


class NodesOnly:
    """An ASGI application that lets other machines reach only what nodes need."""

    def __init__(self, app: App, networks: tuple[Network, ...] = ()) -> None:
        self._app, self._networks = app, networks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes the request on, or answers 403."""
        if scope["type"] == "lifespan" or _for_nodes(scope) or self._may_control(scope):
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            headers = [(b"content-type", b"text/plain"), (b"connection", b"close")]
            await send({"type": "http.response.start", "status": 403, "headers": headers})
            await send({"type": "http.response.body", "body": _FORBIDDEN})

    def _may_control(self, scope: Scope) -> bool:
        """Whether the request comes from this machine, or from a network that may control."""
        try:
            peer = ipaddress.ip_address((scope.get("client") or ("",))[0])
        except ValueError:
            return False
        peer = getattr(peer, "ipv4_mapped", None) or peer
        own = str(peer) == (scope.get("server") or ("",))[0]
        return own or peer.is_loopback or any(peer in network for network in self._networks)


def networks(text: str) -> tuple[Network, ...]:
    """The networks that `text` names, separated by spaces.

    Raises:
        ConfigError: one of them is none.
    """
    try:
        return tuple(ipaddress.ip_network(part) for part in text.split())
    except ValueError as error:
        raise ConfigError(
            sentence("control-from", expected="networks", found=str(error), remedy="write for example 10.0.7.0/24")
        ) from error


def main() -> None:
    """Runs a SuperLink as `flower-superlink` would, with its control closed to other machines."""
    allowed = networks(os.environ.get(CONTROL_VARIABLE, ""))
    extensions.get_middleware = lambda: (Middleware(NodesOnly, networks=allowed),)
    sys.argv[0] = "flower-superlink"
    flower_superlink()


def _for_nodes(scope: Scope) -> bool:
    path = str(scope.get("path", ""))
    return path.startswith(_OPEN_PREFIX) or path == _OPEN_PATH


if __name__ == "__main__":
    main()
