"""Flower's SuperLink, whose control is out of reach of other machines: `python -m fedpeft.engines.flower_superlink`.

Flower 1.41 answers on one port to nodes, to the operator and to the app's own processes, and asks nobody but nodes
for a key: whoever reaches the port could register nodes of his own, and start runs, whose code every node executes.
Here a request from another machine gets no further than what nodes need, unless it comes from a network that
`FEDPEFT_CONTROL_FROM` names. It also reads a request of a node whole, however long; here it has a bound.
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

MOST_BODY_BYTES = 32 * 2**20
"""The longest request of a node: Flower's send an array in pieces of 5 MB."""

_OPEN_PREFIX, _OPEN_PATH = "/v1/fleet/", "/health"
_REFUSALS = {
    403: b"This address serves nodes alone; control the SuperLink from its own machine.\n",
    411: b"A node says how long its request is.\n",
    413: b"A node's request is not so long.\n",
}


class NodesOnly:
    """An ASGI application that lets other machines reach only what nodes need, in requests of bounded length."""

    def __init__(self, app: App, networks: tuple[Network, ...] = ()) -> None:
        self._app, self._networks = app, networks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes the request on, or answers 403, 411 or 413."""
        status = self._refusal(scope)
        if not status:
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            headers = [(b"content-type", b"text/plain"), (b"connection", b"close")]
            await send({"type": "http.response.start", "status": status, "headers": headers})
            await send({"type": "http.response.body", "body": _REFUSALS[status]})

    def _refusal(self, scope: Scope) -> int:
        """The status that refuses the request; 0 where it is passed on."""
        if scope["type"] == "lifespan":
            return 0
        if _for_nodes(scope):
            return _too_long(scope)
        return 0 if self._may_control(scope) else 403

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


def _too_long(scope: Scope) -> int:
    """The status that refuses a request by its length, to which the web server holds it; 0 where it is none."""
    if scope.get("method") != "POST":
        return 0
    length = dict(scope.get("headers") or ()).get(b"content-length", b"")
    if not length.isdigit():
        return 411
    return 413 if len(length) > len(str(MOST_BODY_BYTES)) or int(length) > MOST_BODY_BYTES else 0


def _for_nodes(scope: Scope) -> bool:
    path = str(scope.get("path", ""))
    return path.startswith(_OPEN_PREFIX) or path == _OPEN_PATH


if __name__ == "__main__":
    main()
