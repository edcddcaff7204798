"""A TCP proxy on the loopback that counts what passes."""

from __future__ import annotations

import contextlib
import select
import socket
import socketserver
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field


@dataclass
class Counter:
    """Bytes that have passed, from the nodes (up) and to them (down), and where the proxy listens.

    While `cut` is set nothing passes, and whoever is connected is thrown off.
    """

    port: int = 0
    up: int = 0
    down: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)
    cut: threading.Event = field(default_factory=threading.Event)


@contextlib.contextmanager
def counting_proxy(target: int) -> Iterator[Counter]:
    """Whoever connects to the counter's port reaches the port `target`, while inside."""
    counter = Counter()

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            if counter.cut.is_set():
                return
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", target)) as far:
                back = threading.Thread(target=_pump, args=(far, self.request, counter, "down"), daemon=True)
                back.start()
                _pump(self.request, far, counter, "up")
                back.join()

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads, allow_reuse_address = True, True

    with Server(("127.0.0.1", 0), Handler) as server:
        counter.port = server.server_address[1]
        thread = threading.Thread(target=server.serve_forever, args=(0.1,), daemon=True)
        thread.start()
        yield counter
        server.shutdown()
        thread.join()


def _received(source: socket.socket) -> bytes | None:
    """What came; nothing where the line is closed, None where nothing came in time."""
    ready, _, _ = select.select([source], [], [], 0.2)
    return source.recv(1 << 16) if ready else None


def _pump(source: socket.socket, sink: socket.socket, counter: Counter, way: str) -> None:
    with contextlib.suppress(OSError):
        while not counter.cut.is_set() and (data := _received(source)) != b"":
            if data is None:
                continue
            with counter.lock:
                setattr(counter, way, getattr(counter, way) + len(data))
            sink.sendall(data)
    for each in (source, sink):
        with contextlib.suppress(OSError):
            each.shutdown(socket.SHUT_RDWR)
