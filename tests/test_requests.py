"""What goes down to a node, and what a node makes of it; a node is a memory and the strategy that it shares."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpeft import checkpoint, residuals
from fedpeft.adapters import AdapterSpec, AdapterState, Factors, ModuleSpec, at_rank, resized
from fedpeft.client import handle
from fedpeft.errors import AdapterError, FedPeftError, PacketError
from fedpeft.requests import Received, describe_request, evaluate_request, fit_request, read_request
from fedpeft.stages import Stage, alternate, freeze, keep_local, take_turns
from fedpeft.strategy import Strategy, build
from fedpeft.updates import Drift, Holding, Memory, ServerState
from fedpeft.version import VERSION
from fedpeft.wire import Packet
from tests.toys import (
    RUN,
    SESSION,
    SPEC,
    WIDE,
    WIDE_SESSION,
    Toy,
    bits,
    counted,
    flat,
    never,
    numbers,
    parts,
    site,
    state,
    strategy,
    wide_state,
)

FFA = strategy(freeze(["*.A"]))
PERSONAL = strategy(keep_local(["*.B"]))
CONTROLLED = build(replace(parts(), controls=3))


def request(held: ServerState, plan: Strategy | None = None, rank: int = 0, partition: int = 0) -> Packet:
    return fit_request(plan or strategy(), held, WIDE_SESSION, partition, rank)


def read(packet: Packet, memory: Memory | None = None, plan: Strategy | None = None) -> Received:
    return read_request(packet, plan or strategy(), WIDE, memory or Memory(), lambda: AdapterState(WIDE, counted()))


def changed(packet: Packet, body: bytes | None = None, **changes: Any) -> Packet:
    manifest = {key: value for key, value in {**packet.manifest, **changes}.items() if value is not None}
    return Packet(packet.kind, manifest, packet.body if body is None else body)


def test_a_fit_request_is_for_the_round_to_come_and_an_evaluation_for_the_round_done() -> None:
    now = state(1, 2, 3, round_=4)
    fit, score = fit_request(strategy(), now, SESSION, 0), evaluate_request(strategy(), now, SESSION, 0)
    asked = describe_request(now, SESSION)
    assert (fit.kind, fit.manifest["round"]) == ("fit", 5)
    assert (score.kind, score.manifest["round"]) == ("evaluate", 4)
    assert (asked.kind, asked.manifest["round"], asked.body) == ("describe", 5, b"")
    assert fit.manifest["version"] == score.manifest["version"] == asked.manifest["version"] == VERSION
    assert flat(read_request(fit, strategy(), SPEC, Memory(), never).adapter.tensors) == [1, 2, 3]


# The adapter, at the rank of the node.


@pytest.mark.parametrize("rank", [0, 1, 2, 3, 4, 9])
def test_a_node_is_sent_the_leading_rows_and_columns_of_its_rank(rank: int) -> None:
    packet = request(wide_state(), rank=rank)
    own = at_rank(WIDE, rank)
    found = read(packet)
    assert packet.manifest["rank"] == min(rank or 4, 4)
    assert len(packet.body) == 4 * own.parameters
    assert found.adapter.spec == own
    assert bits(found.adapter.tensors) == bits(resized(counted(), own))
    assert found.adapter.residual == found.control == {}


def test_an_adapter_without_ranks_has_none_on_the_wire() -> None:
    spec = WIDE.only(["head.weight"])
    held = wide_state()
    held = replace(held, adapter=replace(held.adapter, spec=spec, tensors={"head.weight": np.ones(1, np.float32)}))
    for rank in (0, 3):
        packet = request(held, rank=rank)
        assert packet.manifest["rank"] == 0
        assert flat(read_request(packet, strategy(), spec, Memory(), never).adapter.tensors) == [1.0]
    with pytest.raises(PacketError, match="rank: expected an integer from 0 to 0, found 1"):
        read_request(changed(request(held), rank=1), strategy(), spec, Memory(), never)


@pytest.mark.parametrize("rank", [None, 0, -1, 5, True, 2.0, "2", float("nan"), pytest.param(10**400, id="vast")])
def test_a_rank_that_the_adapter_cannot_have_is_refused(rank: object) -> None:
    with pytest.raises(PacketError, match="fit request, rank: expected an integer from 1 to 4, found"):
        read(changed(request(wide_state()), rank=rank))


@pytest.mark.parametrize("body", [b"", bytes(8), bytes(16)])
def test_a_request_of_the_wrong_size_is_refused(body: bytes) -> None:
    with pytest.raises(PacketError, match="12 bytes"):
        read_request(Packet("fit", {"rank": 1, "round": 1}, body), strategy(), SPEC, Memory(), never)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_a_request_of_another_rank_than_it_says_is_refused(rank: int) -> None:
    whole = request(wide_state())
    with pytest.raises(PacketError, match=f"expected {4 * (1 + 26 * rank)} bytes, found 420"):
        read(changed(whole, rank=rank))


def test_a_request_that_is_not_finite_is_refused() -> None:
    body = strategy().codec.encode(numbers(0, float("nan"), 0), SPEC)
    with pytest.raises(AdapterError, match=r"fit request, tensor layer\.A"):
        read_request(Packet("fit", {"rank": 1, "round": 1}, body), strategy(), SPEC, Memory(), never)


# What never changes, and what stays with the node.


def known(rank: int, round_: int = 0) -> dict[int, Holding]:
    return {0: Holding(round_, rank)}


@pytest.mark.parametrize("plan", [FFA, build(parts(frozen=("*.A",)))])
def test_what_never_changes_is_sent_once(plan: Strategy) -> None:
    first = request(wide_state(), plan)
    assert first.manifest["known"] is False
    memory = read(first, plan=plan).memory
    assert sorted(memory.tensors) == ["constant/left.A", "constant/right.A"]
    later = replace(wide_state(1, holdings=known(4)), adapter=wide_state().adapter)
    second = request(later, plan)
    assert second.manifest["known"] is True
    # The head, and B of (6, 4) and (4, 4).
    assert len(second.body) == 4 * (1 + 24 + 16)
    found = read(second, memory, plan)
    assert bits(found.adapter.tensors) == bits(counted())
    assert found.memory == memory


def test_what_some_round_trains_is_sent_each_time() -> None:
    plan = strategy(alternate(["*.A"], ["*.B"]))
    for round_ in (0, 1):
        packet = request(wide_state(round_, holdings=known(4)), plan)
        assert len(packet.body) == 4 * WIDE.parameters
        assert "constant/left.A" not in read(packet, plan=plan).memory.tensors


def test_what_stays_at_its_site_is_sent_once_and_then_its_own() -> None:
    own = {key: np.full(shape, 7, np.float32) for key, shape in WIDE.shapes.items() if key.endswith(".B")}
    first = read(request(wide_state(), PERSONAL), plan=PERSONAL)
    assert bits(first.adapter.tensors) == bits(counted())
    second = request(wide_state(1, holdings=known(4)), PERSONAL)
    # The head, and A of (4, 7) and (4, 9).
    assert len(second.body) == 4 * (1 + 28 + 36)
    found = read(second, Memory(own), PERSONAL).adapter.tensors
    assert bits(found) == bits({**counted(), **own})
    # A server that does not know the node sends all, and the node's own counts.
    again = read(request(wide_state(1), PERSONAL), Memory(own), PERSONAL).adapter.tensors
    assert bits(again) == bits({**counted(), **own})


@pytest.mark.parametrize("plan", [FFA, PERSONAL])
def test_a_node_whose_rank_grew_is_sent_all_again(plan: Strategy) -> None:
    held = wide_state(1, holdings=known(2))
    small, great = request(held, plan, rank=2), request(held, plan, rank=3)
    assert (small.manifest["known"], great.manifest["known"]) == (True, False)
    assert len(great.body) == 4 * at_rank(WIDE, 3).parameters
    memory = read(request(wide_state(), plan, rank=2), plan=plan).memory
    assert bits(read(great, memory, plan).adapter.tensors) == bits(resized(counted(), at_rank(WIDE, 3)))


def test_a_node_whose_rank_fell_cuts_what_it_has() -> None:
    memory = read(request(wide_state(), FFA), plan=FFA).memory
    packet = request(wide_state(1, holdings=known(4)), FFA, rank=1)
    assert packet.manifest["known"] is True
    found = read(packet, memory, FFA)
    assert bits(found.adapter.tensors) == bits(resized(counted(), at_rank(WIDE, 1)))
    assert found.memory.tensors["constant/left.A"].shape == (4, 7)


def test_what_a_node_trained_at_another_rank_is_cut_or_padded() -> None:
    own = {"left.B": np.full((6, 2), 7, np.float32), "right.B": np.full((4, 2), 8, np.float32)}
    for rank in (1, 2, 4):
        found = read(request(wide_state(), PERSONAL, rank=rank), Memory(own), PERSONAL).adapter.tensors
        assert found["left.B"].tolist() == resized(own, at_rank(WIDE, rank).only(["left.B"]))["left.B"].tolist()


@pytest.mark.parametrize(("plan", "lost"), [(FFA, "left.A"), (PERSONAL, "left.B")])
def test_a_node_that_lost_its_memory_names_what_it_lacks(plan: Strategy, lost: str) -> None:
    packet = request(wide_state(1, holdings=known(4)), plan)
    with pytest.raises(PacketError, match=f"expected {lost} in this node's memory, found none; ask again"):
        read(packet, plan=plan)
    reply, memory = handle(packet, Memory(), site(0, plan, Toy(0, spec=WIDE)))
    assert reply.kind == "failure"
    assert f"expected {lost} in this node's memory" in str(reply.manifest["reason"])
    assert memory == Memory()


def test_an_evaluation_counts_on_the_same_memory() -> None:
    packet = evaluate_request(FFA, wide_state(1, holdings=known(4)), WIDE_SESSION, 0)
    with pytest.raises(PacketError, match=r"evaluate request: expected left\.A in this node's memory"):
        read(packet, plan=FFA)
    memory = read(request(wide_state(), FFA), plan=FFA).memory
    assert bits(read(packet, memory, FFA).adapter.tensors) == bits(counted())


# The residual beside the base.


def drawn(rank: int, seed: int) -> dict[str, Factors]:
    random = np.random.default_rng(seed)
    shapes = {"left": (6, 7), "right": (4, 9)}
    return {
        path: Factors(random.standard_normal((outputs, rank)), random.standard_normal((rank, inputs)))
        for path, (outputs, inputs) in shapes.items()
    }


def grown(held: ServerState, rank: int = 1, budget: int = 0) -> ServerState:
    """The state one round on, whose residual has grown by `rank`."""
    round_ = held.round + 1
    after = residuals.grow(held.adapter, held.drift, round_, drawn(rank, round_), budget)
    return replace(held, round=round_, adapter=after.adapter, drift=after.drift)


def hears(held: ServerState, partition: int = 0, rank: int = 4) -> ServerState:
    """The state when the partition is known to have what the round after it sent."""
    return replace(held, holdings={**held.holdings, partition: Holding(held.round, rank)})


@dataclass
class Node:
    """A node's memory between requests."""

    partition: int
    plan: Strategy = field(default_factory=strategy)
    memory: Memory = field(default_factory=Memory)

    def hear(self, held: ServerState, rank: int = 0) -> tuple[Packet, Received]:
        packet = request(held, self.plan, rank, self.partition)
        received = read(packet, self.memory, self.plan)
        self.memory = received.memory
        return packet, received


def test_only_new_columns_go_down_to_a_node_that_answered() -> None:
    held, node = wide_state(), Node(0)
    sizes = []
    for _ in range(2):
        packet, received = node.hear(held)
        sizes.append(len(packet.body) - 4 * WIDE.parameters)
        assert bits(received.adapter.residual) == bits(held.adapter.residual)
        held = grown(hears(held))
    # No residual at first; then rank 1 on (6, 7) and on (4, 9).
    assert sizes == [0, 4 * (6 + 7 + 4 + 9)]
    packet, received = node.hear(held)
    assert (packet.manifest["residual.from"], packet.manifest["residual.to"]) == ("1,1", "2,2")
    assert len(packet.body) == 4 * (WIDE.parameters + 26)
    assert bits(received.adapter.residual) == bits(held.adapter.residual)
    assert node.memory.fields["residual"] == {"epoch": 0, "ranks": [2, 2]}


def test_a_node_that_is_up_to_date_is_sent_no_column() -> None:
    held, node = hears(grown(wide_state())), Node(0)
    node.memory = read(request(grown(wide_state()))).memory
    packet, received = node.hear(held)
    assert (packet.manifest["residual.from"], packet.manifest["residual.to"]) == ("1,1", "1,1")
    assert len(packet.body) == 4 * WIDE.parameters
    assert bits(received.adapter.residual) == bits(held.adapter.residual)


def test_a_node_that_was_away_is_sent_all_that_it_missed() -> None:
    first = grown(wide_state())
    node = Node(0, memory=read(request(first)).memory)
    held = grown(grown(hears(first), 2), 1)
    assert held.holdings[0].round == 1
    packet, received = node.hear(held)
    assert (packet.manifest["residual.from"], packet.manifest["residual.to"]) == ("1,1", "4,4")
    assert bits(received.adapter.residual) == bits(held.adapter.residual)


def test_a_late_joiner_is_sent_everything() -> None:
    held = grown(grown(hears(wide_state(), partition=0)))
    packet, received = Node(7).hear(held)
    assert (packet.manifest["residual.from"], packet.manifest["residual.to"]) == ("0,0", "2,2")
    assert bits(received.adapter.residual) == bits(held.adapter.residual)


def test_columns_that_were_rewritten_all_go_down_again() -> None:
    first = grown(wide_state())
    node = Node(0, memory=read(request(first)).memory)
    held = grown(hears(first), budget=1)
    assert held.drift.epoch == 2
    packet, received = node.hear(held)
    assert (packet.manifest["residual.from"], packet.manifest["residual.epoch"]) == ("0,0", 2)
    assert bits(received.adapter.residual) == bits(held.adapter.residual)
    assert node.memory.fields["residual"] == {"epoch": 2, "ranks": [1, 1]}
    assert [key for key in node.memory.tensors if key.startswith("residual/")] == [
        f"residual/{path}.{name}" for path in ("left", "right") for name in ("A", "B")
    ]


def test_the_residual_is_whole_at_a_node_of_any_rank() -> None:
    held = grown(wide_state(), 2)
    received = Node(0).hear(held, rank=1)[1]
    assert received.adapter.spec == at_rank(WIDE, 1)
    assert bits(received.adapter.residual) == bits(held.adapter.residual)


def test_a_residual_stays_in_memory_when_nothing_is_said_of_one() -> None:
    node = Node(0)
    node.hear(grown(wide_state()))
    kept = node.memory
    _, received = node.hear(wide_state())
    assert received.adapter.residual == {}
    assert node.memory == kept


def behind() -> tuple[Packet, ServerState]:
    """A request that counts on one column in a node's memory, and the state that it is made from."""
    held = grown(hears(grown(wide_state())))
    return request(held), held


@pytest.mark.parametrize(
    "memory",
    [
        Memory(),
        Memory({}, {"residual": {"epoch": 0, "ranks": [0, 0]}}),
        Memory({}, {"residual": {"epoch": 0, "ranks": [1, 0]}}),
        Memory({}, {"residual": {"epoch": 0, "ranks": [1]}}),
        Memory({}, {"residual": {"epoch": 3, "ranks": [1, 1]}}),
    ],
)
def test_a_node_without_the_columns_that_are_counted_on_says_so(memory: Memory) -> None:
    packet, _ = behind()
    with pytest.raises(PacketError, match="residual: expected ranks 1,1 of epoch 0 in this node's memory, found"):
        read(packet, memory)
    reply, after = handle(packet, memory, site(0, learner=Toy(0, spec=WIDE)))
    assert reply.kind == "failure"
    assert "all of it will be sent" in str(reply.manifest["reason"])
    assert after is memory


def test_a_memory_with_more_columns_than_are_counted_on_serves() -> None:
    """A round that is done again counts on less than its first try left behind."""
    packet, held = behind()
    ahead = grown(held)
    memory = read(request(replace(ahead, holdings={}))).memory
    assert memory.fields["residual"]["ranks"] == [3, 3]
    received = read(packet, memory)
    assert bits(received.adapter.residual) == bits(held.adapter.residual)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"residual.to": "2,2,2"}, "request"),
        ({"residual.to": "2"}, "request"),
        ({"residual.to": "0,0"}, "request"),
        ({"residual.to": "2,-2"}, "request"),
        ({"residual.from": "-1,-1"}, "request"),
        ({"residual.from": "1,1,1"}, "request"),
        ({"residual.from": "3,1"}, "request"),
        ({"residual.from": "1,1,1", "residual.to": "2,2,2"}, "request"),
        ({"residual.from": "1", "residual.to": "2"}, "request"),
        ({"residual.from": "", "residual.to": "9"}, "request"),
        ({"residual.to": "two,2"}, "expected integers with commas between, found 'two,2'"),
        ({"residual.to": "2;2"}, "expected integers with commas between"),
        ({"residual.from": "1.0,1"}, "expected integers with commas between"),
        ({"residual.to": True}, "expected integers with commas between"),
        ({"residual.to": "99999999999999999999,2"}, "bytes, found"),
        ({"residual.to": "x" * 10_000}, "expected integers with commas between"),
        ({"residual.to": None}, "bytes, found"),
        ({"residual.from": None}, "bytes, found"),
        ({"residual.epoch": None}, "residual"),
        ({"residual.epoch": "soon"}, "residual"),
        ({"residual.epoch": float("nan")}, "residual"),
        ({"residual.epoch": 1}, "of epoch 1 in this node's memory"),
    ],
)
def test_a_malformed_residual_is_refused(fields: dict[str, Any], words: str) -> None:
    packet, _ = behind()
    memory = read(request(grown(wide_state()))).memory
    broken = changed(packet, **fields)
    with pytest.raises(PacketError, match=words) as caught:
        read(broken, memory)
    assert len(str(caught.value)) < 400
    reply, after = handle(broken, memory, site(0, learner=Toy(0, spec=WIDE)))
    assert (reply.kind, after) == ("failure", memory)


def test_a_residual_that_is_not_finite_is_refused() -> None:
    packet = request(grown(wide_state()))
    body = packet.body[:-4] + np.float32(np.inf).tobytes()
    with pytest.raises(AdapterError, match=r"fit request, residual, tensor right\.B: expected finite numbers"):
        read(changed(packet, body))


@given(st.text(max_size=12), st.text(max_size=12), st.binary(max_size=8) | st.just(bytes(4 * (105 + 26))))
def test_noise_in_a_residual_is_refused_in_words(start: str, end: str, body: bytes) -> None:
    packet = Packet("fit", {"rank": 4, "round": 1, "residual.from": start, "residual.to": end}, body)
    with pytest.raises(FedPeftError, match=r"expected .*, found .*; .*\."):
        read(packet)


# Control variates.


def test_the_control_variate_goes_down_at_the_rank_of_the_node() -> None:
    control = {key: value + 100 for key, value in counted().items()}
    held = wide_state(control=control)
    for rank in (0, 2):
        own = at_rank(WIDE, rank)
        packet = request(held, CONTROLLED, rank)
        assert len(packet.body) == 8 * own.parameters
        found = read(packet, plan=CONTROLLED)
        assert bits(found.control) == bits(resized(control, own))
    with pytest.raises(PacketError, match="expected 840 bytes, found 420"):
        read(request(held), plan=CONTROLLED)


def test_a_control_variate_stands_behind_the_residual() -> None:
    control = {key: value + 100 for key, value in counted().items()}
    held = grown(replace(wide_state(), control=control))
    found = read(request(held, CONTROLLED), plan=CONTROLLED)
    assert bits(found.control) == bits(control)
    assert bits(found.adapter.residual) == bits(held.adapter.residual)


def test_a_control_variate_that_is_not_finite_is_refused() -> None:
    packet = request(wide_state(control=counted()), CONTROLLED)
    with pytest.raises(AdapterError, match="expected finite numbers"):
        read(changed(packet, packet.body[:-4] + np.float32(np.nan).tobytes()), plan=CONTROLLED)


@pytest.mark.parametrize("stage", [freeze(["*.A"]), keep_local(["*.B"]), alternate(["*.A"], ["*.B"])])
def test_control_variates_are_of_what_is_shared_in_the_round(stage: Stage) -> None:
    plan = build(replace(parts(stage), controls=3))
    for round_ in (0, 1):
        held = wide_state(round_, control=counted())
        found = read(request(held, plan), plan=plan)
        assert found.control.keys() == plan.stage.shared(WIDE, round_ + 1).shapes.keys()


# All of it together.

actions = st.lists(
    st.tuples(st.sampled_from(["answers", "fails", "is away", "forgets"]), st.integers(1, 4), st.integers(0, 2)),
    min_size=1,
    max_size=8,
)


@given(actions, st.sampled_from(["plain", "ffa", "personal"]), st.integers(0, 3))
def test_whatever_happened_before_a_node_has_what_the_server_means_it_to_have(
    story: list[tuple[str, int, int]], kind: str, budget: int
) -> None:
    """A node answers, fails, is away or forgets, its rank changes, and the residual grows."""
    plan = {"plain": strategy(), "ffa": FFA, "personal": PERSONAL}[kind]
    held, node = wide_state(), Node(0, plan)
    for does, rank, more in story:
        if does == "forgets":
            node.memory = Memory()
        if does != "is away":
            packet = request(held, plan, rank)
            try:
                received = read(packet, node.memory, plan)
            except PacketError:
                # What it lacked it is sent when it is asked again, because it is no longer counted on.
                assert does == "forgets"
                held = replace(held, holdings={})
                received = read(request(held, plan, rank), node.memory, plan)
            own = at_rank(WIDE, rank)
            assert bits(received.adapter.residual) == bits(held.adapter.residual)
            mine = {key: value for key, value in node.memory.tensors.items() if "/" not in key}
            assert bits(received.adapter.tensors) == bits(resized({**held.adapter.tensors, **mine}, own))
            if does == "fails":
                held = replace(held, holdings={})
            else:
                trained = {key: received.adapter.tensors[key] for key in plan.stage.local(own, 1)}
                node.memory = Memory({**received.memory.tensors, **trained}, received.memory.fields)
                most = max(rank, held.holdings[0].rank if 0 in held.holdings else 0)
                held = replace(held, holdings={0: Holding(held.round, most)})
        if more:
            held = grown(held, more, budget)
            rounds = {held.round, *(holding.round for holding in held.holdings.values())}
            held = replace(held, drift=residuals.forget(held.drift, rounds))


def test_the_same_goes_down_after_a_checkpoint(tmp_path: Path) -> None:
    held = grown(hears(grown(hears(grown(wide_state()), 1, 2)), 2), 3)
    held = replace(held, control=counted())
    checkpoint.save(tmp_path, held)
    back = checkpoint.load(tmp_path)
    for plan in (strategy(), FFA, PERSONAL, CONTROLLED):
        for partition in (0, 1, 2):
            for rank in (0, 2):
                assert request(back, plan, rank, partition) == request(held, plan, rank, partition)


def test_a_drift_without_the_ranks_of_a_round_sends_everything() -> None:
    held = grown(hears(grown(wide_state())))
    forgotten = replace(held, drift=Drift(held.drift.epoch, {held.round: held.drift.ranks[held.round]}))
    assert request(forgotten).manifest["residual.from"] == "0,0"


# Layers that take turns.

LAYERED = AdapterSpec(
    "base",
    "lora",
    (
        ModuleSpec("head", "full", 0, 1.0, (("weight", (1,)),)),
        *(ModuleSpec(f"layer.{n}.q", "lora", 1, 1.0, (("A", (1, 2)), ("B", (3, 1)))) for n in range(3)),
    ),
)
TURNS = strategy(take_turns(3))


def turned(held: ServerState) -> ServerState:
    """The state after one more round, in which what has its turn moves by 1."""
    moved = TURNS.stage.shared(LAYERED, held.round + 1).shapes
    tensors = {key: value + 1 if key in moved else value for key, value in held.adapter.tensors.items()}
    return replace(held, round=held.round + 1, adapter=replace(held.adapter, tensors=tensors))


def layered(round_: int = 0, **more: Any) -> ServerState:
    held = ServerState(RUN, 0, 0, AdapterState(LAYERED, counted(1, LAYERED)), **more)
    for _ in range(round_):
        held = turned(held)
    return held


@pytest.mark.parametrize(("since", "layers"), [(5, 0), (4, 1), (3, 2), (2, 3), (0, 3)])
def test_only_layers_that_had_a_turn_since_a_node_was_heard_of_go_down(since: int, layers: int) -> None:
    held = layered(5)
    packet = request(replace(held, holdings=known(1, since)), TURNS)
    assert packet.manifest["since"] == since
    # Each layer has 2 + 3 numbers; the head moves in every round.
    assert len(packet.body) == 4 * ((1 if layers else 0) + 5 * layers)
    assert len(request(held, TURNS).body) == 4 * (1 + 5 * 3)
    assert "since" not in request(held, TURNS).manifest
    assert "since" not in request(replace(wide_state(5), holdings=known(4, 3)), FFA).manifest


@given(st.lists(st.booleans(), min_size=1, max_size=12))
def test_a_node_has_the_servers_adapter_to_the_bit_however_often_it_was_away(takes_part: list[bool]) -> None:
    held, memory = layered(), Memory()
    for there in takes_part:
        if there:
            found = read_request(request(held, TURNS), TURNS, LAYERED, memory, never)
            assert bits(found.adapter.tensors) == bits(held.adapter.tensors)
            memory, since = found.memory, held.round
            held = replace(turned(held), holdings=known(1, since))
            scored = evaluate_request(TURNS, held, WIDE_SESSION, 0)
            assert bits(read_request(scored, TURNS, LAYERED, memory, never).adapter.tensors) == bits(
                held.adapter.tensors
            )
        else:
            held = turned(held)


def test_a_node_that_has_layers_of_another_round_asks_for_all_of_them() -> None:
    memory = read_request(request(layered(), TURNS), TURNS, LAYERED, Memory(), never).memory
    packet = request(replace(layered(4), holdings=known(1, 3)), TURNS)
    with pytest.raises(PacketError, match="those of round 3 in this node's memory, found those of round 0"):
        read_request(packet, TURNS, LAYERED, memory, never)
    with pytest.raises(PacketError, match="found those of round None"):
        read_request(packet, TURNS, LAYERED, Memory(), never)


@pytest.mark.parametrize("since", [-1, 6, True, "3", 2.0])
def test_a_round_that_cannot_have_been_is_refused(since: Any) -> None:
    packet = request(replace(layered(4), holdings=known(1, 3)), TURNS)
    with pytest.raises(PacketError, match="request, since: expected an integer from 0 to 5"):
        read_request(changed(packet, since=since), TURNS, LAYERED, Memory(), never)
