"""The first adapter as nodes build it for themselves: the same bits as if it were sent, for the bytes of a digest."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedpeft.adapters import AdapterState
from fedpeft.client import handle
from fedpeft.codecs import coded, dense, steps
from fedpeft.errors import PacketError
from fedpeft.first_adapters import BUILT
from fedpeft.quarantine import Conduct
from fedpeft.requests import fit_request, read_request
from fedpeft.rounds import step
from fedpeft.stages import freeze, keep_local, take_turns
from fedpeft.strategy import Strategy, build
from fedpeft.updates import Holding, Memory, ServerState
from fedpeft.wire import Failure, Packet
from tests.toys import (
    RUN,
    WIDE,
    WIDE_SESSION,
    Script,
    Toy,
    bits,
    counted,
    federate,
    never,
    nobody,
    parts,
    plan,
    site,
    wide_state,
)

EIGHT = coded(rounding=steps(255, 8, "stochastic"))
FFA = freeze(["*.A"])


class Unlike(Toy):
    """A learner whose first adapter is another."""

    @property
    def start(self) -> AdapterState:
        return AdapterState(WIDE, {key: value + 1 for key, value in counted().items()})


def building(stage: Any = None, **more: Any) -> Strategy:
    return build(replace(parts(stage), builds=True, **more))


def start() -> AdapterState:
    return AdapterState(WIDE, counted())


@pytest.mark.parametrize("rank", [0, 2, 4])
def test_a_digest_stands_for_the_first_adapter(rank: int) -> None:
    plain, chosen = build(parts()), building()
    sent = read_request(fit_request(plain, wide_state(), WIDE_SESSION, 0, rank), plain, WIDE, Memory(), never)
    request = fit_request(chosen, wide_state(), WIDE_SESSION, 0, rank)
    found = read_request(request, chosen, WIDE, Memory(), start)
    assert request.body == b""
    assert bits(found.adapter.tensors) == bits(sent.adapter.tensors)
    assert found.memory == sent.memory


@pytest.mark.parametrize(
    ("stage", "down"),
    [
        (None, dense()),
        (FFA, dense()),
        (keep_local(["*.B"]), dense()),
        (take_turns(2), dense()),
        (None, EIGHT),
        (FFA, EIGHT),
    ],
)
def test_runs_come_to_the_same_bits_and_memories(stage: Any, down: Any, tmp_path: Path) -> None:
    """Also where a client comes in late, and where what never changes is built and the rest is sent."""
    found = {}
    for builds in (False, True):
        chosen = build(replace(parts(stage), builds=builds, downlink=down))
        first = chosen.init(RUN, 3, start())
        made = plan(session=WIDE_SESSION, rounds=4, cohort=2, clients=3)
        root = tmp_path / str(builds)
        found[builds] = federate(root, made, 3, chosen, first)
    assert bits(found[True].adapter.tensors) == bits(found[False].adapter.tensors)
    one, other = (sorted((tmp_path / str(builds) / "memories").rglob("*.safetensors")) for builds in (False, True))
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in other]


def test_later_what_never_changes_is_built_and_the_rest_is_sent() -> None:
    chosen, moved = building(FFA), {key: value + 1 for key, value in counted().items()}
    tensors = {key: counted()[key] if key.endswith(".A") else moved[key] for key in moved}
    state = ServerState(RUN, 3, 0, AdapterState(WIDE, tensors))
    request = fit_request(chosen, state, WIDE_SESSION, 0)
    assert len(request.body) == dense().size(chosen.travelling(WIDE)) < dense().size(WIDE)
    assert bits(read_request(request, chosen, WIDE, Memory(), start).adapter.tensors) == bits(tensors)
    known = replace(state, holdings={0: Holding(2, 4)})
    assert BUILT not in fit_request(chosen, known, WIDE_SESSION, 0).manifest
    everything = fit_request(building(), state, WIDE_SESSION, 0)
    assert BUILT not in everything.manifest
    assert len(everything.body) == dense().size(WIDE)


def test_a_node_that_builds_another_says_so_and_is_sent_the_numbers_when_it_is_asked_again() -> None:
    chosen, state = building(), wide_state()
    odd = {**counted(), "left.A": np.nextafter(counted()["left.A"], np.float32(np.inf))}
    request = fit_request(chosen, state, WIDE_SESSION, 0)
    with pytest.raises(PacketError, match=r"first adapter, as this node builds it: expected SHA-256 .*; ask again"):
        read_request(request, chosen, WIDE, Memory(), lambda: AdapterState(WIDE, odd))
    whole = fit_request(chosen, state, WIDE_SESSION, 0, whole=True)
    assert bits(read_request(whole, chosen, WIDE, Memory(), never).adapter.tensors) == bits(counted())
    failed = replace(state, conduct={0: Conduct(((1, 0.5),))})
    assert fit_request(chosen, failed, WIDE_SESSION, 0) == whole


def test_in_one_round_it_is_asked_again() -> None:
    """A node without the base's bits fails, hears all of the adapter at the next attempt, and takes part."""
    chosen = building()
    heard: list[tuple[int, bool]] = []

    class Line(Script):
        def exchange(
            self, requests: Mapping[int, Packet], timeout_seconds: float
        ) -> Iterator[tuple[int, Packet | Failure]]:
            for partition, request in requests.items():
                heard.append((partition, BUILT in request.manifest))
                learner = (Toy, Unlike)[partition](partition, spec=WIDE)
                yield partition, handle(request, Memory(), site(partition, chosen, learner))[0]

    made = plan(session=WIDE_SESSION, quorum=2, retries=1)
    state, record = step(chosen, made, wide_state(), Line([]), nobody())
    assert heard == [(0, True), (1, True), (1, False)]
    assert [client["partition"] for client in record["clients"]] == [0, 1]
    assert "as this node builds it" in record["failures"][0]["reason"]
    assert state.round == 1


def test_a_strategy_that_builds_nothing_takes_no_digest_for_numbers() -> None:
    request = fit_request(building(), wide_state(), WIDE_SESSION, 0)
    with pytest.raises(PacketError, match="fit request: expected 420 bytes, found 0"):
        read_request(request, build(parts()), WIDE, Memory(), start)
