"""Whether a process that serves somebody far away is well, for those who ask on its own machine."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

SILENT_SECONDS = 180.0
"""A process that has heard of nobody for so long, and has nothing in hand, is not well."""

_OK, _ILL, _UNKNOWN = 200, 503, 404

_logger = logging.getLogger(__name__)


class Pulse:
    """When somebody was last heard of, and whether work is in hand; any thread may ask."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._heard, self._at_work = clock(), False

    def beat(self) -> None:
        """Somebody was heard of."""
        self._heard = self._clock()

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Inside, work is in hand, however long it takes."""
        self._at_work = True
        try:
            yield
        finally:
            self._at_work = False
            self.beat()

    @property
    def complaint(self) -> str:
        """What is wrong, in a few words; empty for a process that is well."""
        silent = self._clock() - self._heard
        return f"nothing heard for {silent:.0f} s" if silent > SILENT_SECONDS and not self._at_work else ""


@contextmanager
def shown(pulse: Pulse, port: int) -> Iterator[None]:
    """Inside, `http://127.0.0.1:PORT/health` answers 200 while `pulse` is well, else 503 with its complaint.

    With port 0 nothing answers. Nor where the port cannot be had, which is a warning: the work itself needs no port.
    """
    server = _bound(pulse, port) if port else None
    if server is None:
        yield
        return
    with server:
        threading.Thread(target=server.serve_forever, name="health", daemon=True).start()
        try:
            yield
        finally:
            server.shutdown()


def _bound(pulse: Pulse, port: int) -> ThreadingHTTPServer | None:
    try:
        return ThreadingHTTPServer(("127.0.0.1", port), partial(_Page, pulse))
    except OSError as error:
        _logger.warning(
            "no page /health: port %d cannot be had (%s); name another, or 0 for none", port, error.strerror
        )
        return None


class _Page(BaseHTTPRequestHandler):
    def __init__(self, pulse: Pulse, *arguments: Any) -> None:
        self._pulse = pulse
        super().__init__(*arguments)

    def do_GET(self) -> None:
        complaint = self._pulse.complaint
        if self.path != "/health":
            self.send_error(_UNKNOWN)
            return
        self.send_response(_ILL if complaint else _OK, complaint or None)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *arguments: Any) -> None:
        """Who asked is no news."""
