"""Attacks by a node on the server's round, each by name, and by a server on a node."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedpeft.engines.local import answer
from fedpeft.errors import FedPeftError, PacketError
from fedpeft.memory import FolderMemory
from fedpeft.requests import evaluate_request, fit_request
from fedpeft.rounds import Record, step
from fedpeft.updates import ServerState
from fedpeft.wire import MOST_EXAMPLES, Failure, Packet, require_examples
from tests.toys import SESSION, Script, flat, honest, nobody, plan, site, state, strategy, update

MOST_BYTES = 2 * 10**6
"""What a round of toys may allocate, whatever a node sends."""

Forge = Callable[[Packet], Packet]


def with_fields(**changes: Any) -> Forge:
    """A reply that is honest but for these fields; one that is None is left out."""

    def forge(packet: Packet) -> Packet:
        manifest = {key: value for key, value in {**packet.manifest, **changes}.items() if value is not None}
        return replace(packet, manifest=manifest)

    return forge


def with_body(body: bytes) -> Forge:
    """A reply that is honest but for its payload."""
    return lambda packet: replace(packet, body=body)


def with_numbers(*values: float) -> Forge:
    return with_body(np.array(values, "<f4").tobytes())


# Each attack, and words of the sentence that goes on record.
ATTACKS: dict[str, tuple[Forge, str]] = {
    "rank bomb": (with_fields(rank=2**40), "rank: expected an integer from 1 to 1"),
    "rank of two thousand bits": (with_fields(rank=2**2000), "found an integer of 2001 bits"),
    "rank of 5000 digits": (with_fields(rank=10**5000), "found an integer of"),
    "terabyte header": (with_fields(shape="1099511627776", dtype="float32"), "found 2 more, such as 'shape'"),
    "nan": (with_numbers(0, float("nan"), 0), "expected finite numbers"),
    "infinity": (with_numbers(0, float("inf"), 0), "expected finite numbers"),
    "numbers that overflow once squared": (with_numbers(0, 3e38, 0), "expected numbers of at most 1.15292e+18"),
    "huge norm": (with_numbers(1e6, 1e6, 1e6), "expected a norm of at most 100"),
    "key injection": (with_fields(**{"delta.layer.C": 1.0}), "found 1 more"),
    "a path for a name": (with_fields(**{"metric.../../etc/passwd\0": 1.0}), "expected names of ASCII letters"),
    "an escape sequence for a name": (with_fields(**{"metric.\x1b[2J": 1.0}), "expected names of ASCII letters"),
    "markup for a name": (with_fields(**{"metric.<script>": 1.0}), "expected names of ASCII letters"),
    "half a surrogate pair for a name": (with_fields(**{"\ud800": 1}), "found 1 more"),
    "half a surrogate pair for a figure's name": (with_fields(**{"metric.\ud800": 1.0}), "ASCII letters"),
    "a mark of the server's own": (with_fields(**{"metric.late": 1.0}), "such as 'metric.late'"),
    "an earlier round": (lambda _: honest(1, 1), "field round: expected 2, found 1"),
    "a later round": (with_fields(round=3), "field round: expected 2, found 3"),
    "a round that is a float": (with_fields(round=2.0), "field round: expected 2, found 2.0"),
    "another run": (with_fields(run="run-2"), "field run"),
    "no run": (with_fields(run=None), "field run"),
    "another partition": (with_fields(partition=0), "field partition: expected 1, found 0"),
    "a partition that is true": (with_fields(partition=True), "field partition: expected 1, found True"),
    "another base model": (with_fields(spec="0" * 64), "field spec"),
    "other settings": (with_fields(config="decaf"), "field config"),
    "another version": (with_fields(version="99.0.0"), "field version"),
    "a text of a million letters": (with_fields(version="9" * 10**6), "field version"),
    "another kind": (lambda packet: replace(packet, kind="description"), "field kind"),
    "a request for an answer": (lambda packet: replace(packet, kind="fit"), "field kind"),
    "a kind of a million letters": (lambda packet: replace(packet, kind="x" * 10**6), "field kind"),
    "no body": (with_body(b""), "expected 12 bytes"),
    "a body cut short": (lambda packet: replace(packet, body=packet.body[:-1]), "12 bytes"),
    "a body too long": (lambda packet: replace(packet, body=packet.body * 2), "at most 12 bytes"),
    "a pickle": (with_body(b"\x80\x04\x95" + bytes(9)), ""),
    "a thousand figures": (with_fields(**{f"metric.m{i}": 1.0 for i in range(1000)}), "expected at most 64 metrics"),
    "a figure beyond all": (with_fields(**{"metric.loss": 1.7e308}), "expected a finite number"),
    "a figure that is no number": (with_fields(**{"metric.loss": float("nan")}), "expected a finite number"),
    "a figure of 5000 digits": (with_fields(**{"metric.loss": 10**5000}), "found an integer of"),
    "no examples": (with_fields(examples=0), "examples: expected an integer from 1"),
    "fewer than no examples": (with_fields(examples=-(10**9)), "examples: expected an integer from 1"),
    "more examples than there are": (with_fields(examples=MOST_EXAMPLES + 1), "examples: expected an integer from 1"),
    "a share of an example": (with_fields(examples=0.5), "examples: expected an integer from 1"),
    "examples that are true": (with_fields(examples=True), "examples: expected an integer from 1"),
    "tokens without end": (with_fields(tokens=2**63), "tokens: expected an integer from 1"),
    "a failure with a book for a reason": (lambda _: Packet("failure", {"reason": "x" * 10**6}), "xxx"),
    "a failure that paints the terminal": (lambda _: Packet("failure", {"reason": "\x1b[31m\ud800\n"}), "[31m"),
}
HARMLESS = {"a pickle"}
"""What is only numbers to the server: the bytes of a pickle are read as floats, never as a pickle."""


def after(forged: Packet | Failure, *more: tuple[int, Packet | Failure]) -> tuple[ServerState, Record]:
    """Round 2 of three clients in which partition 1 answers `forged`, and then `more` comes."""
    script = Script([(0, None), (1, forged), *more, (2, None)], 3)
    return step(strategy(), plan(cohort=3, most_norm=100.0), state(0, 0, 0, round_=1), script, nobody())


ABSENT, _ = after(Failure("no answer within the deadline"))


@pytest.mark.parametrize("name", sorted(ATTACKS.keys() - HARMLESS))
def test_an_attack_ends_on_record_and_changes_nothing(name: str) -> None:
    forge, words = ATTACKS[name]
    forged = forge(honest(1, 2))
    tracemalloc.start()
    try:
        found, record = after(forged)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    [failure] = record["failures"]
    assert failure["partition"] == 1
    assert words in failure["reason"]
    assert failure["reason"].isprintable()
    assert len(failure["reason"]) <= 500
    assert flat(found.adapter.tensors) == flat(ABSENT.adapter.tensors)
    assert found == replace(ABSENT, adapter=found.adapter)
    assert peak < MOST_BYTES


def test_a_pickle_is_read_as_numbers_and_bounded_like_others() -> None:
    found, _ = after(ATTACKS["a pickle"][0](honest(1, 2)))
    assert np.isfinite(flat(found.adapter.tensors)).all()


def test_an_answer_that_comes_twice_counts_once() -> None:
    once, _ = after(honest(1, 2))
    twice, record = after(honest(1, 2), (1, honest(1, 2)), (1, with_numbers(9, 9, 9)(honest(1, 2))))
    assert flat(once.adapter.tensors) == flat(twice.adapter.tensors)
    assert [client["partition"] for client in record["clients"]] == [0, 1, 2]


def test_what_nobody_was_asked_for_is_passed_over() -> None:
    once, _ = after(honest(1, 2))
    found, _ = after(honest(1, 2), (7, honest(1, 2)), (-1, honest(1, 2)))
    assert flat(once.adapter.tensors) == flat(found.adapter.tensors)


def test_more_examples_than_the_operator_allows_are_refused() -> None:
    require_examples(update((1, 1, 1), 100), 100, "update")
    require_examples(update((1, 1, 1), 10**9), 0, "update")
    with pytest.raises(PacketError, match="expected at most 100, found 1000000000"):
        require_examples(update((1, 1, 1), 10**9), 100, "update")


# A hostile server.

REQUESTS: dict[str, tuple[dict[str, Any], bytes | None]] = {
    "no run": ({"run": None}, None),
    "a run that is a path": ({"run": "../../etc"}, None),
    "a run of a million letters": ({"run": "r" * 10**6}, None),
    "a run with another alphabet's digits": ({"run": "run-\u0663"}, None),
    "no round": ({"round": None}, None),
    "a round that is a text": ({"round": "1"}, None),
    "a round that is infinite": ({"round": float("inf")}, None),
    "a round that is true": ({"round": True}, None),
    "a round before the first": ({"round": -1}, None),
    "a round of 5000 digits": ({"round": 10**5000}, None),
    "a rank bomb": ({"rank": 2**40}, None),
    "another version": ({"version": "99"}, None),
    "other settings": ({"config": "decaf"}, None),
    "another base model": ({"spec": "0" * 64}, None),
    "no body": ({}, b""),
    "a body too long": ({}, bytes(10**5)),
    "numbers that are none": ({}, np.full(3, np.nan, "<f4").tobytes()),
    "a residual without end": ({"residual.to": "99999999999999999999", "residual.from": "0"}, None),
    "a residual of a million letters": ({"residual.to": "9" * 10**6}, None),
    "a residual that is no text": ({"residual.to": 3}, None),
    "a memory that is not there": ({"known": True}, b""),
}


@pytest.mark.parametrize("name", sorted(REQUESTS))
@pytest.mark.parametrize("kind", ["fit", "evaluate"])
def test_a_hostile_request_is_refused_in_a_sentence_and_leaves_no_trace(name: str, kind: str, tmp_path: Path) -> None:
    changes, body = REQUESTS[name]
    request = _request(kind)
    forged = with_fields(**changes)(replace(request, body=request.body if body is None else body))
    tracemalloc.start()
    try:
        try:
            reply = answer(forged, site(0), FolderMemory(tmp_path))
        except FedPeftError as error:
            reply = Packet("failure", {"reason": str(error)})
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert reply.kind == "failure"
    assert ": expected " in str(reply.manifest["reason"])
    assert len(str(reply.manifest["reason"])) < 500
    assert list(tmp_path.rglob("*")) == []
    assert peak < 4 * MOST_BYTES


def _request(kind: str) -> Packet:
    make = {"fit": fit_request, "evaluate": evaluate_request}[kind]
    return make(strategy(), state(0, 0, 0, round_=1), SESSION, 0)
