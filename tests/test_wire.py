from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.adapters import at_rank
from fedpeft.errors import AdapterError, FedPeftError, PacketError
from fedpeft.merges import Pruning
from fedpeft.stages import keep_local, keep_silent
from fedpeft.strategy import Strategy, build
from fedpeft.updates import Update
from fedpeft.wire import (
    MOST_EXAMPLES,
    MOST_MAGNITUDE,
    Packet,
    fit_reply,
    read_metrics,
    read_update,
    require_manifest,
    require_norm,
)
from tests.toys import CONFIG, RUN, SESSION, SPEC, WIDE, counted, flat, honest, parts, strategy, update

EXPECTED = {**SESSION.manifest(1), "partition": 0}
values = st.floats(-MOST_MAGNITUDE, MOST_MAGNITUDE, width=32)


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
    found = read(fit_reply(strategy(), sent, EXPECTED, 1))
    assert flat(found.delta) == flat(sent.delta)
    assert (found.examples, found.tokens, found.metrics) == (examples, tokens, {"loss": loss})


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
    with pytest.raises(PacketError, match="expected at most 8 bytes, those of 2 tensors at rank 1, found 12"):
        read_update(reply(), plan, SPEC, EXPECTED)


def wide(rank: Any, own: int = 2, body: bytes | None = None, plan: Strategy | None = None) -> Packet:
    """A reply that holds an adapter of rank `own` and says that it is of `rank`."""
    sent = Update(at_rank(WIDE, own), counted(own), 1, 1, control=counted(own) if plan and plan.controls else {})
    packet = fit_reply(plan or strategy(), sent, EXPECTED, rank)
    return packet if body is None else Packet(packet.kind, packet.manifest, body)


@pytest.mark.parametrize("rank", [1, 2, 3, 4])
def test_a_node_that_pruned_itself_answers_at_a_lower_rank_than_asked(rank: int) -> None:
    pruning = build(parts(pruning=Pruning(0.5, 0.1)))
    found = read_update(wide(rank, rank), pruning, WIDE, EXPECTED)
    assert found.spec == at_rank(WIDE, rank)
    assert found.delta["left.A"].shape == (rank, 7)
    assert found.delta["right.B"].shape == (4, rank)
    assert {key: value.tolist() for key, value in found.delta.items()} == {
        key: value.tolist() for key, value in counted(rank).items()
    }


@pytest.mark.parametrize("rank", [None, 0, -1, True, 2.0, "2", 4, pytest.param(10**400, id="vast")])
def test_a_rank_above_the_one_asked_or_none_at_all_is_refused(rank: object) -> None:
    packet = wide(2, 2)
    packet = Packet("update", {**packet.manifest, "rank": rank}, packet.body)  # type: ignore[dict-item]
    with pytest.raises(PacketError, match=r"partition 0, rank: expected an integer from \d to 3, found"):
        read_update(packet, strategy(), at_rank(WIDE, 3), EXPECTED)


def test_an_update_without_its_rank_is_refused() -> None:
    with pytest.raises(PacketError, match=r"partition 0, rank: expected an integer from \d to 2, found None"):
        read_update(Packet("update", {**EXPECTED, "examples": 1, "tokens": 1}), strategy(), at_rank(WIDE, 2), EXPECTED)


def test_a_payload_of_another_rank_than_it_says_is_refused() -> None:
    # 1 + 26 numbers for each rank.
    with pytest.raises(PacketError, match="expected at most 212 bytes, those of 5 tensors at rank 2, found 316"):
        read_update(wide(2, 3), strategy(), at_rank(WIDE, 2), EXPECTED)
    with pytest.raises(PacketError, match="316 bytes"):
        read_update(wide(3, 2), strategy(), at_rank(WIDE, 3), EXPECTED)


def test_an_adapter_without_ranks_says_none() -> None:
    spec = WIDE.only(["head.weight"])
    sent = Update(spec, {"head.weight": np.array([5], np.float32)}, 1, 1)
    found = read_update(fit_reply(strategy(), sent, EXPECTED, 0), strategy(), spec, EXPECTED)
    assert flat(found.delta) == [5.0]


CONTROLLED = build(replace(parts(), controls=4))


def test_a_control_variate_travels_beside_the_update() -> None:
    packet = wide(2, 2, plan=CONTROLLED)
    found = read_update(packet, CONTROLLED, at_rank(WIDE, 2), EXPECTED)
    for tensors in (found.delta, found.control):
        assert flat(tensors) == flat(counted(2))
    for body in (packet.body[:-4], packet.body[:212], packet.body[:208], b"", packet.body + bytes(4)):
        with pytest.raises(PacketError, match="bytes"):
            read_update(wide(2, 2, body, CONTROLLED), CONTROLLED, at_rank(WIDE, 2), EXPECTED)
    broken = packet.body[:-4] + np.float32(np.nan).tobytes()
    with pytest.raises(AdapterError, match=r"control variate, tensor right\.B: expected finite numbers"):
        read_update(wide(2, 2, broken, CONTROLLED), CONTROLLED, at_rank(WIDE, 2), EXPECTED)


def test_a_control_variate_that_nobody_asked_for_is_refused() -> None:
    with pytest.raises(PacketError, match=r"expected at most 212 bytes, .*, found 424"):
        read_update(wide(2, 2, plan=CONTROLLED), strategy(), at_rank(WIDE, 2), EXPECTED)


def test_an_update_as_long_as_the_bound_passes_and_one_above_it_is_refused() -> None:
    # ‖(2, 3, 6)‖ = 7.
    require_norm(update((2, 3, 6)), 7.0, "here")
    require_norm(update((2e30, 3, 6)), 0.0, "here")
    with pytest.raises(PacketError, match=r"^here: expected a norm of at most 6\.9, found 7; clip or lower"):
        require_norm(update((2, 3, 6)), 6.9, "here")


def test_metrics_are_floats_by_name() -> None:
    packet = Packet("evaluation", {"metric.rows": 3, "metric.accuracy": 0.5, "rows": 9})
    assert read_metrics(packet, "here") == {"rows": 3.0, "accuracy": 0.5}


def test_a_manifest_may_say_more_than_is_asked() -> None:
    require_manifest(Packet("fit", {"run": RUN, "more": 1}), "fit", {"run": RUN})


def test_a_silent_update_takes_no_bytes_and_is_read_as_zero() -> None:
    quiet = strategy(keep_silent(0.5, 3))
    packet = fit_reply(quiet, replace(update((0, 0, 0), 5, 50), silent=True), EXPECTED, 1)
    found = read_update(packet, quiet, SPEC, EXPECTED)
    assert (packet.body, flat(found.delta), found.silent) == (b"", [0, 0, 0], True)
    assert (found.examples, found.tokens) == (5, 50)


def test_an_empty_update_is_refused_where_nobody_may_be_silent() -> None:
    with pytest.raises(PacketError, match=r"expected .*12 bytes"):
        read(reply(b""))
    spoken = read_update(reply(), strategy(keep_silent(0.5, 3)), SPEC, EXPECTED)
    assert (flat(spoken.delta), spoken.silent) == ([2, 2, 2], False)
