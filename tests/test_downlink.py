"""What goes down as deltas: both ends agree to the bit on what was sent, and whoever lacks it is sent it all."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedpeft import checkpoint
from fedpeft.adapters import AdapterState, norm
from fedpeft.client import handle
from fedpeft.codecs import Codec, as_sent, coded, dense, next_sent, steps, top_k, zstd
from fedpeft.errors import PacketError
from fedpeft.optimizers import momentum
from fedpeft.requests import evaluate_request, fit_request, read_request
from fedpeft.stages import alternate, freeze
from fedpeft.strategy import Strategy, build
from fedpeft.updates import Holding, Memory, ServerState
from fedpeft.wire import Packet, read_update
from tests.toys import RUN, WIDE, WIDE_SESSION, Toy, counted, federate, flat, never, parts, plan, site

EIGHT = coded(rounding=steps(255, 8, "stochastic"))
CODECS = (EIGHT, coded(top_k(0.3)), coded(top_k(0.5), steps(15, 8, "nearest"), zstd(3)))


def strategy(codec: Codec, stage: Any = None) -> Strategy:
    return build(replace(parts(stage), downlink=codec, optimizer=momentum(0.7, 0.5, "sum"), seed=3))


def start(chosen: Strategy) -> ServerState:
    return chosen.init(RUN, 3, AdapterState(WIDE, counted()))


def round_of(
    chosen: Strategy, state: ServerState, memory: Memory, partition: int = 0
) -> tuple[ServerState, Memory, Packet, Toy]:
    """The state after a round with one client, its memory, what it was sent, and what it saw."""
    learner = Toy(partition, spec=WIDE)
    request = fit_request(chosen, state, WIDE_SESSION, partition)
    reply, memory = handle(request, memory, site(partition, chosen, learner))
    assert reply.kind == "update", reply.manifest
    number = state.round + 1
    update = read_update(reply, chosen, WIDE, {**WIDE_SESSION.manifest(number), "partition": partition})
    after, _ = chosen.aggregate(state, [update])
    return replace(after, holdings={partition: Holding(state.round, 4)}), memory, request, learner


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("stage", [None, freeze(["left.A"]), alternate(["*.A"], ["*.B"])])
def test_a_client_trains_from_what_the_server_says_it_was_sent(codec: Codec, stage: Any) -> None:
    chosen = strategy(codec, stage)
    state, memory = start(chosen), Memory()
    for number in range(5):
        sent = as_sent(state).tensors
        state, memory, request, learner = round_of(chosen, state, memory)
        assert ("held" in request.manifest) == (number > 0)
        assert all(np.array_equal(learner.seen[0].tensors[key], sent[key]) for key in WIDE.shapes)
        moved = {key: learner.seen[0].tensors[key] - state.adapter.tensors[key] for key in WIDE.shapes}
        assert norm(moved) > 0
    assert len(request.body) <= codec.size(chosen.travelling(WIDE)) < dense().size(chosen.travelling(WIDE))


@pytest.mark.parametrize("codec", CODECS)
def test_what_a_delta_lost_is_part_of_the_next(codec: Codec) -> None:
    """Where the server's adapter stands still, what clients are sent comes to it."""
    chosen = strategy(codec)
    state, memory = start(chosen), Memory()
    state, memory, _, _ = round_of(chosen, state, memory)
    far = [norm({key: as_sent(state).tensors[key] - state.adapter.tensors[key] for key in WIDE.shapes})]
    still = build(replace(parts(rate=1e-30), downlink=codec, seed=3))
    for _ in range(40):
        state, memory, _, _ = round_of(still, state, memory)
        far.append(norm({key: as_sent(state).tensors[key] - state.adapter.tensors[key] for key in WIDE.shapes}))
    assert far[0] > 0
    assert far[-1] <= 1e-3 * far[0] + 1e-4


def test_whoever_missed_a_round_is_sent_what_the_others_have() -> None:
    chosen = strategy(EIGHT)
    state, memory = start(chosen), Memory()
    state, memory, _, _ = round_of(chosen, state, memory)
    state, memory, _, _ = round_of(chosen, state, memory)
    whole = fit_request(chosen, state, WIDE_SESSION, 1)
    assert "held" not in whole.manifest
    adapter = read_request(whole, chosen, WIDE, Memory(), never).adapter
    assert flat(adapter.tensors) == flat(as_sent(state).tensors)
    older = replace(state, holdings={1: Holding(0, 4)})
    assert "held" not in fit_request(chosen, older, WIDE_SESSION, 1).manifest
    own = read_request(evaluate_request(chosen, state, WIDE_SESSION, 0), chosen, WIDE, memory, never).adapter
    assert flat(own.tensors) == flat(adapter.tensors)


def test_a_client_that_lost_its_memory_says_so_and_a_delta_that_was_damaged_is_refused() -> None:
    chosen = strategy(EIGHT)
    state, memory, _, _ = round_of(chosen, start(chosen), Memory())
    state, memory, _, _ = round_of(chosen, state, memory)
    request = fit_request(chosen, state, WIDE_SESSION, 0)
    words = "expected the adapter after round 1 in this node's memory, found none; ask again; it will be sent"
    with pytest.raises(PacketError, match=words):
        read_request(request, chosen, WIDE, Memory(), never)
    odd = Memory(memory.tensors, {**memory.fields, "sent": 5})
    with pytest.raises(PacketError, match="found that after 5"):
        read_request(request, chosen, WIDE, odd, never)
    for body in (request.body[:-1], b"", request.body + b"\0", bytes([request.body[0] ^ 4]) + request.body[1:]):
        with pytest.raises(PacketError, match="coded payload: expected"):
            read_request(replace(request, body=body), chosen, WIDE, memory, never)
    for held in (0, 2, -1, True, 1.0, "1", 10**30):
        with pytest.raises(PacketError, match="fit request, held: expected 1, the round before, found"):
            read_request(replace(request, manifest={**request.manifest, "held": held}), chosen, WIDE, memory, never)


@pytest.mark.parametrize("codec", CODECS)
def test_a_run_that_stops_and_goes_on_sends_what_one_does_that_never_stopped(tmp_path: Path, codec: Codec) -> None:
    chosen = strategy(codec)
    made = plan(session=WIDE_SESSION, rounds=5)
    whole = federate(tmp_path / "whole", made, plan=chosen, first=start(chosen))
    federate(tmp_path / "parts", replace(made, rounds=2), plan=chosen, first=start(chosen))
    again = federate(tmp_path / "parts", made, plan=chosen, first=start(chosen))
    assert flat(again.adapter.tensors) == flat(whole.adapter.tensors)
    assert again.sent.delta == whole.sent.delta != b""
    assert flat(again.sent.tensors) == flat(whole.sent.tensors)
    assert checkpoint.load(tmp_path / "whole" / "checkpoint").sent.delta == whole.sent.delta


def test_the_journal_counts_deltas_and_nobody_fails(tmp_path: Path) -> None:
    found = {}
    for name, codec in (("dense", dense()), ("eight", EIGHT)):
        chosen = strategy(codec)
        made = plan(session=WIDE_SESSION, rounds=4, evaluate_on_clients=True)
        federate(tmp_path / name, made, clients=2, plan=chosen, first=start(chosen))
        lines = [json.loads(line) for line in (tmp_path / name / "journal.jsonl").read_text().splitlines()]
        found[name] = [line for line in lines if line.get("event") == "round"]
        assert all(not line["failures"] for line in found[name])
        assert all(line["client_evaluation"]["rows"] == 4 for line in found[name])
    first, later = ([lines[at]["bytes_down"] for lines in found.values()] for at in (0, 3))
    assert first[0] == first[1]
    # Two clients; eight bits and a sixteenth of two bytes a number, and the field that says what they have.
    saved = dense().size(WIDE) - EIGHT.size(WIDE) - len("held") - 8
    assert later[0] - later[1] == 2 * saved


def test_rounding_of_deltas_is_drawn_anew_in_each_round_and_for_each_seed() -> None:
    chosen, spec = strategy(EIGHT), strategy(EIGHT).travelling(WIDE)
    first = start(chosen)
    moved = {key: value + np.float32(0.1) * np.sqrt(value) for key, value in counted().items()}

    def delta(round_: int, seed: int) -> bytes:
        after = replace(first, round=round_, seed=seed, adapter=AdapterState(WIDE, moved))
        return next_sent(EIGHT, first.sent, after, spec).delta

    assert len({delta(round_, seed) for round_ in (1, 2) for seed in (3, 4)}) == 4
    assert delta(1, 3) == delta(1, 3)


def test_a_dense_downlink_leaves_the_state_and_the_memory_as_they_were() -> None:
    chosen = strategy(dense())
    state, memory, request, _ = round_of(chosen, start(chosen), Memory())
    assert not state.sent.tensors
    assert "held" not in request.manifest
    assert not memory.tensors
