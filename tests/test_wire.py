from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.errors import AdapterError, FedPeftError, PacketError
from fedpeft.stages import keep_local
from fedpeft.version import VERSION
from fedpeft.wire import (
    MOST_EXAMPLES,
    Packet,
    evaluate_request,
    fit_reply,
    fit_request,
    read_adapter,
    read_metrics,
    read_update,
    require_manifest,
)
from tests.toys import CONFIG, RUN, SESSION, SPEC, flat, honest, numbers, state, strategy, update

EXPECTED = {**SESSION.manifest(1), "partition": 0}
values = st.floats(width=32, allow_nan=False, allow_infinity=False)


def reply(body: bytes | None = None, kind: str = "update", **changes: Any) -> Packet:
    """An honest reply, less what is changed; a field changed to None is left out."""
    packet = honest(0)
    manifest = {key: value for key, value in {**packet.manifest, **changes}.items() if value is not None}
    return Packet(kind, manifest, packet.body if body is None else body)


def read(packet: Packet) -> Any:
    return read_update(packet, strategy(), SPEC, EXPECTED)


@given(st.tuples(values, values, values), st.integers(1, MOST_EXAMPLES), st.integers(1, MOST_EXAMPLES), values)
def test_an_update_comes_out_as_it_went_in(
    delta: tuple[float, float, float], examples: int, tokens: int, loss: float
) -> None:
    sent = update(delta, examples, tokens, loss=loss)
    found = read(fit_reply(strategy(), sent, EXPECTED))
    assert flat(found.delta) == flat(sent.delta)
    assert (found.examples, found.tokens, found.metrics) == (examples, tokens, {"loss": loss})


def test_a_fit_request_is_for_the_round_to_come_and_an_evaluation_for_the_round_done() -> None:
    now = state(1, 2, 3, round_=4)
    fit, score = fit_request(strategy(), now, SESSION), evaluate_request(strategy(), now, SESSION)
    assert (fit.kind, fit.manifest["round"]) == ("fit", 5)
    assert (score.kind, score.manifest["round"]) == ("evaluate", 4)
    assert fit.manifest["version"] == VERSION
    assert flat(read_adapter(fit, strategy(), SPEC).tensors) == [1, 2, 3]


def test_size_counts_payload_names_texts_and_numbers() -> None:
    # "fit" 3, "run" 3 + "r" 1, "round" 5 + 8, "ok" 2 + 8, body 4.
    assert Packet("fit", {"run": "r", "round": 1, "ok": True}, b"1234").size_bytes == 34
    assert Packet("é").size_bytes == 2


def test_an_honest_reply_is_read() -> None:
    assert flat(read(reply()).delta) == [2, 2, 2]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("run", "run-2"),
        ("run", None),
        ("round", 2),
        ("round", 0),
        ("round", "1"),
        ("round", True),
        ("round", float("nan")),
        ("partition", 1),
        ("partition", -1),
        ("partition", False),
        ("spec", "0" * 64),
        ("spec", None),
        ("config", CONFIG.upper()),
        ("config", None),
        ("version", "0.0.0"),
        ("version", None),
    ],
)
def test_a_reply_to_something_else_is_refused(field: str, value: object) -> None:
    with pytest.raises(PacketError, match=f"field {field}: expected "):
        read(reply(**{field: value}))


@pytest.mark.parametrize("kind", ["fit", "evaluation", "failure", "", "Update"])
def test_another_kind_is_refused(kind: str) -> None:
    with pytest.raises(PacketError, match="field kind: expected 'update'"):
        read(reply(kind=kind))


@pytest.mark.parametrize("key", ["examples", "tokens"])
@pytest.mark.parametrize("value", [None, 0, -1, True, 1.0, "3", float("inf"), MOST_EXAMPLES + 1, 10**400])
def test_an_absurd_count_is_refused(key: str, value: object) -> None:
    with pytest.raises(PacketError, match=f"partition 0, {key}: expected an integer from 1 to {MOST_EXAMPLES}"):
        read(reply(**{key: value}))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), True, "low", 10**400, -(10**400)])
def test_a_metric_that_is_no_finite_number_is_refused(value: object) -> None:
    with pytest.raises(PacketError, match=r"partition 0, metric\.loss: expected a finite number"):
        read(reply(**{"metric.loss": value}))


def test_a_flood_of_metrics_is_refused() -> None:
    flood = {f"metric.{i}": 1.0 for i in range(10_000)}
    with pytest.raises(PacketError, match="expected at most"):
        read(reply(**flood))
    with pytest.raises(PacketError, match="expected at most"):
        read(reply(**{"metric." + "x" * 10_000: 1.0}))


@pytest.mark.parametrize("size", [0, 4, 11, 13, 10**6])
def test_a_payload_of_the_wrong_size_is_refused(size: int) -> None:
    with pytest.raises(PacketError, match="12 bytes"):
        read(reply(bytes(size)))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("at", range(3))
def test_a_payload_that_is_not_finite_is_refused(value: float, at: int) -> None:
    body = np.zeros(3, "<f4")
    body[at] = value
    with pytest.raises(AdapterError, match=r"update of partition 0, tensor .*: expected finite numbers"):
        read(reply(body.tobytes()))


@given(st.binary(max_size=16), st.dictionaries(st.text(max_size=8), st.integers() | st.text(max_size=4) | st.floats()))
def test_noise_is_refused_in_words(body: bytes, noise: dict[str, Any]) -> None:
    for packet in (Packet("update", noise, body), Packet("update", {**EXPECTED, **noise}, body)):
        with pytest.raises(FedPeftError, match=r"expected .*, found .*; .*\."):
            read(packet)


def test_a_payload_of_what_should_have_stayed_local_is_refused() -> None:
    plan = strategy(keep_local(["head.*"]))
    with pytest.raises(PacketError, match="expected at most 8 bytes, found 12"):
        read_update(reply(), plan, plan.stage.shared(SPEC), EXPECTED)


@pytest.mark.parametrize("body", [b"", bytes(8), bytes(16)])
def test_a_request_of_the_wrong_size_is_refused(body: bytes) -> None:
    with pytest.raises(PacketError, match="12 bytes"):
        read_adapter(Packet("fit", {}, body), strategy(), SPEC)


def test_a_request_that_is_not_finite_is_refused() -> None:
    body = strategy().codec.encode(numbers(0, float("nan"), 0), SPEC)
    with pytest.raises(AdapterError, match=r"fit request, tensor layer\.A"):
        read_adapter(Packet("fit", {}, body), strategy(), SPEC)


def test_metrics_are_floats_by_name() -> None:
    packet = Packet("evaluation", {"metric.rows": 3, "metric.accuracy": 0.5, "rows": 9})
    assert read_metrics(packet, "here") == {"rows": 3.0, "accuracy": 0.5}


def test_a_manifest_may_say_more_than_is_asked() -> None:
    require_manifest(Packet("fit", {"run": RUN, "more": 1}), "fit", {"run": RUN})
