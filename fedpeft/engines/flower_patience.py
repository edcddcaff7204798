"""A node's connection that outlives a cut of its line.

Flower's own tries again for ever where a connection is refused, but gives up at once on one that is cut while TLS is
agreed on, which is how a cut looks from behind a proxy or a load balancer: the answer in hand was then lost, and the
round waited for it until its deadline. It also lets half a minute pass between two tries.

It leans on names of `flwr.supernode` that are no public interface; versions are pinned, and a test holds them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from flwr.supercore import heartbeat
from flwr.supercore.retry import RetryInvoker, exponential, make_simple_http_retry_invoker
from flwr.supernode import fleet_http_connection

MOST_PAUSE_SECONDS = 5
"""The longest pause between two tries; a pause is drawn between nothing and it."""


@contextmanager
def patient_connection(
    address: str, insecure: bool, root_certificates: str | None, keys: tuple[Any, Any] | None, heartbeat_seconds: int
) -> Iterator[tuple[Any, ...]]:
    """What Flower's `http_request_response` yields; once it has been made, no cut ends a call.

    The server hears every `heartbeat_seconds`, or somewhat sooner, that the node is alive.

    Raises:
        SystemExit: there is no connection; Flower says why.
    """
    invokers: list[RetryInvoker] = []

    def noted() -> RetryInvoker:
        invokers.append(make_simple_http_retry_invoker())
        return invokers[-1]

    _put(heartbeat, HEARTBEAT_DEFAULT_INTERVAL=heartbeat_seconds)
    _put(
        fleet_http_connection,
        HEARTBEAT_DEFAULT_INTERVAL=heartbeat_seconds,
        make_simple_http_retry_invoker=noted,
    )
    with fleet_http_connection.http_request_response(address, insecure, root_certificates, keys) as found:
        for invoker in invokers:
            make_patient(invoker)
        yield found


def make_patient(invoker: RetryInvoker) -> None:
    """`invoker` tries again whatever happens to the line, but not against a certificate that is not the server's."""
    gives_up = invoker.should_giveup
    invoker.should_giveup = lambda error: not _of_the_line(error) and (gives_up is None or gives_up(error))
    invoker.wait_gen_factory = lambda: exponential(max_delay=MOST_PAUSE_SECONDS)


def _put(module: ModuleType, **values: object) -> None:
    """`module` has these values under names that it has already; another version of Flower may not.

    Raises:
        AttributeError: it has no such name.
    """
    for name, value in values.items():
        getattr(module, name)
        setattr(module, name, value)


def _of_the_line(error: Exception) -> bool:
    """Whether there was no answer at all, and no certificate that was refused."""
    return getattr(error, "response", None) is None and "certificate" not in str(error).lower()
