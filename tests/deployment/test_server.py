"""A server alone: how it is isolated, that it says it is well, and that it stops at once."""

from __future__ import annotations

import time

import pytest

from tests.deployment.federation import Federation
from tests.engines import processes

pytestmark = [pytest.mark.engines, pytest.mark.assets]


def test_a_server_in_process_isolation_is_well_and_stops_at_once(federation: Federation) -> None:
    where = ("--keys", federation.keys, "--port", federation.port)
    with federation.server("--isolation", "process") as server:
        assert "well" in federation.script("server.health", *where)
        processes.until(
            lambda: federation.said("server", "executor: started"), 20, "executor", federation.log("server")
        )
        assert federation.script("server.nodes", "list") == ""
        server.terminate()
        began = time.monotonic()
        assert server.wait(30) == 0
        assert time.monotonic() - began < 15
    assert federation.said("server", "superlink: stopped")
    assert federation.said("server", "executor: stopped")
    assert "expected a server that answers" in federation.refused("server.health", *where)
    assert "Connection to the SuperLink is unavailable" in federation.refused("server.nodes", "list")


def test_without_tls_the_log_says_so(federation: Federation) -> None:
    with federation.server("--insecure"):
        assert "well" in federation.script("server.health", "--insecure", "--port", federation.port)
        assert federation.said("server", "--insecure: nothing is encrypted, and any node may join")
