from __future__ import annotations

from collections.abc import Callable

import httpx
import pytest
from flwr.supercore.retry import RetryInvoker, make_simple_http_retry_invoker

from fedpeft.engines.flower_patience import MOST_PAUSE_SECONDS, make_patient

CUT = "[SSL: UNEXPECTED_EOF_WHILE_READING] EOF occurred in violation of protocol (_ssl.c:1006)"
"""What a proxy or a load balancer whose server is away looks like to a node that knocks."""

REFUSED = "[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: unable to get local issuer certificate"
FOUND = httpx.Response(500, request=httpx.Request("POST", "https://localhost/v1/fleet/push-messages"))


@pytest.fixture
def invoker() -> RetryInvoker:
    found = make_simple_http_retry_invoker()
    make_patient(found)
    found.wait_function = lambda _: None
    return found


def failing(error: Exception, times: int) -> tuple[list[int], Callable[[], str]]:
    calls: list[int] = []

    def call() -> str:
        calls.append(1)
        if len(calls) <= times:
            raise error
        return "through"

    return calls, call


@pytest.mark.parametrize("error", [httpx.ConnectError(CUT), httpx.ReadError(""), httpx.ConnectError("refused")])
def test_a_call_outlives_whatever_happens_to_the_line(invoker: RetryInvoker, error: Exception) -> None:
    calls, call = failing(error, 5)
    assert invoker.invoke(call) == "through"
    assert len(calls) == 6


@pytest.mark.parametrize(
    "error", [httpx.ConnectError(REFUSED), httpx.HTTPStatusError("ill", request=FOUND.request, response=FOUND)]
)
def test_it_does_not_outlive_another_servers_certificate_or_a_refusal(invoker: RetryInvoker, error: Exception) -> None:
    calls, call = failing(error, 5)
    with pytest.raises(type(error)):
        invoker.invoke(call)
    assert len(calls) == 1


def test_pauses_stay_short(invoker: RetryInvoker) -> None:
    pauses = invoker.wait_gen_factory()
    assert max(next(pauses) for _ in range(20)) == MOST_PAUSE_SECONDS
