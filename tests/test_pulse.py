from __future__ import annotations

import logging

import pytest

from fedpeft.errors import FederationError
from fedpeft.pulse import SILENT_SECONDS, Pulse, shown
from fedpeft.supervision import require_well
from tests.engines.processes import free_ports


class Clock:
    """Seconds that a test sets."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_process_is_well_until_it_has_heard_nothing_for_long_unless_it_is_at_work() -> None:
    clock = Clock()
    pulse = Pulse(clock)
    clock.now = SILENT_SECONDS
    assert not pulse.complaint
    clock.now += 1
    assert "nothing heard for 181 s" in pulse.complaint
    with pulse.at_work():
        clock.now += 3600
        assert not pulse.complaint
    assert not pulse.complaint
    clock.now += SILENT_SECONDS + 1
    assert pulse.complaint
    pulse.beat()
    assert not pulse.complaint


def test_the_page_says_how_the_process_is_while_it_is_shown() -> None:
    clock = Clock()
    pulse = Pulse(clock)
    (port,) = free_ports(1)
    url = f"http://127.0.0.1:{port}/health"
    with shown(pulse, port):
        require_well(url, "a node")
        with pytest.raises(FederationError, match="Not Found"):
            require_well(url.replace("health", "other"), "a node")
        clock.now = 2 * SILENT_SECONDS
        with pytest.raises(FederationError, match="expected a node that answers, found nothing heard for 360 s"):
            require_well(url, "a node")
    with pytest.raises(FederationError, match="refused"):
        require_well(url, "a node")


def test_a_port_that_cannot_be_had_is_a_warning_and_no_end(caplog: pytest.LogCaptureFixture) -> None:
    (port,) = free_ports(1)
    with shown(Pulse(), port), caplog.at_level(logging.WARNING), shown(Pulse(), port):
        pass
    assert f"port {port} cannot be had" in caplog.text


def test_without_a_port_there_is_no_page_and_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    with shown(Pulse(), 0):
        pass
    assert not caplog.text
