from __future__ import annotations

import asyncio
from typing import Any

import pytest
from flwr.superlink import main as superlink_app

from fedpeft.engines import flower_superlink
from fedpeft.engines.flower_superlink import MOST_BODY_BYTES, NodesOnly, networks
from fedpeft.errors import ConfigError
from server.start import CONTROL_VARIABLE

FAR, OWN = "192.0.2.7", "10.0.0.5"


async def inner(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200})


def status(path: str, client: str | None, allowed: str = "", server: str = OWN, **more: Any) -> int:
    """The status of a request for `path` from the address `client` to the address `server`."""
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "http.request"}

    scope = {"type": "http", "path": path, "client": client and (client, 40000), "server": (server, 46000), **more}
    asyncio.run(NodesOnly(inner, networks(allowed))(scope, receive, send))
    return int(sent[0]["status"])


@pytest.mark.parametrize("path", ["/v1/fleet/pull-messages", "/v1/fleet/activate-node", "/health"])
def test_other_machines_reach_what_nodes_need(path: str) -> None:
    assert status(path, FAR) == 200


@pytest.mark.parametrize(
    "path",
    ["/v1/control/register-node", "/v1/control/start-run", "/v1/runtime/acquire-task", "/docs", "/", "/health/x"],
)
def test_other_machines_do_not_reach_control(path: str) -> None:
    assert status(path, FAR) == 403
    assert status(path, None) == 403
    assert status(path, "localhost") == 403


@pytest.mark.parametrize("client", ["127.0.0.1", "::1", "::ffff:127.0.0.1", OWN])
def test_the_own_machine_controls(client: str) -> None:
    assert status("/v1/control/start-run", client) == 200


def test_a_network_that_is_named_controls_and_no_other() -> None:
    assert status("/v1/control/start-run", FAR, "10.9.0.0/16 192.0.2.0/24") == 200
    assert status("/v1/control/start-run", "192.0.3.7", "10.9.0.0/16 192.0.2.0/24") == 403
    with pytest.raises(ConfigError, match="control-from: expected networks"):
        networks("10.0.7.3/24")


def test_a_request_of_another_kind_is_not_passed_on() -> None:
    async def never(scope: Any, receive: Any, send: Any) -> None:
        raise AssertionError

    scope = {"type": "websocket", "path": "/v1/control/x", "client": (FAR, 1), "server": (OWN, 2)}
    asyncio.run(NodesOnly(never)(scope, None, None))  # type: ignore[arg-type]


def test_flowers_superlink_takes_the_gate_as_its_outermost_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[bool] = []
    monkeypatch.setenv(CONTROL_VARIABLE, "192.0.2.0/24")
    monkeypatch.setattr(flower_superlink.extensions, "get_middleware", tuple)
    monkeypatch.setattr(flower_superlink, "flower_superlink", lambda: started.append(True))
    monkeypatch.setattr("sys.argv", ["test"])
    flower_superlink.main()
    outermost = superlink_app._get_middleware()[0]
    assert started == [True]
    assert outermost.cls is NodesOnly
    assert outermost.kwargs == {"networks": networks("192.0.2.0/24")}


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ([(b"content-length", b"%d" % MOST_BODY_BYTES)], 200),
        ([(b"content-length", b"%d" % (MOST_BODY_BYTES + 1))], 413),
        ([(b"content-length", b"9" * 5000)], 413),
        ([(b"content-length", b"-1")], 411),
        ([(b"transfer-encoding", b"chunked")], 411),
    ],
)
def test_a_request_of_a_node_says_how_long_it_is_and_is_not_too_long(
    headers: list[tuple[bytes, bytes]], expected: int
) -> None:
    assert status("/v1/fleet/push-object", FAR, method="POST", headers=headers) == expected
