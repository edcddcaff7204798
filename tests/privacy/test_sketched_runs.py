"""Runs whose server finds the mean of products from two sums: exact where it can be, over the same clients, or not."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedpeft import secure_rounds
from fedpeft.config import RunConfig
from fedpeft.engines.local import LocalTransport
from fedpeft.errors import QuorumError
from fedpeft.experiment import site_of
from fedpeft.federate import federate
from fedpeft.memory import FolderMemory
from fedpeft.runs import folder_for, reopen
from fedpeft.secure_client import _PRODUCTS
from fedpeft.wire import Failure, Packet
from tests.privacy.sums import Watched, rounds_of, run, weights

pytestmark = pytest.mark.usefixtures("one_thread")

RULE = ("aggregation.merge.rule=flexlora", "aggregation.merge.flexlora.weights=uniform", "adapter.lora.rank=2")
PLAIN = ("federation.channel.kind=plain",)
UNLIKE = ("adapter.lora.rank=3", "federation.ranks.rule=listed", "federation.ranks.listed.ranks=1,2,3")


@pytest.fixture
def sketched(plan: Callable[..., RunConfig]) -> Callable[..., RunConfig]:
    return lambda out, *overrides: plan(out, *RULE, *overrides)


def effects(root: Path) -> dict[str, np.ndarray]:
    """What an adapter does to each weight, and its other tensors: products do not tell of signs, and nor do models."""
    found = weights(root)
    return {
        key: found[key.replace("lora_A", "lora_B")] @ value if "lora_A" in key else value
        for key, value in found.items()
        if "lora_B" not in key
    }


def distance(one: Path, other: Path) -> float:
    first, second = effects(one), effects(other)
    return max(float(np.abs(value - second[key]).max()) for key, value in first.items())


@pytest.mark.parametrize("more", [(), UNLIKE], ids=["one rank", "unlike ranks"])
def test_two_sums_give_the_adapter_that_a_server_gets_who_sees_every_update(
    sketched: Callable[..., RunConfig], tmp_path: Path, more: tuple[str, ...]
) -> None:
    summed, _ = run(sketched("secure", *more))
    seen, _ = run(sketched("plain", *more, *PLAIN))
    assert distance(tmp_path / "secure", tmp_path / "plain") < 2e-4
    for record, other in zip(rounds_of(summed), rounds_of(seen), strict=True):
        assert record["merge_error"] == pytest.approx(other["merge_error"], abs=1e-3)
        assert record["merge_lacks"] < 0.01
        assert "merge_lacks" not in other


def test_what_a_narrow_sketch_loses_is_on_record(sketched: Callable[..., RunConfig], tmp_path: Path) -> None:
    narrow = ("rounds=1", "training.learning_rate=0.1", "training.steps=8", "aggregation.merge.flexlora.sketch=3")
    (summed,) = rounds_of(run(sketched("secure", *narrow))[0])
    (seen,) = rounds_of(run(sketched("plain", *narrow, *PLAIN))[0])
    assert distance(tmp_path / "secure", tmp_path / "plain") > 0.01
    assert 0.05 + seen["merge_error"] < summed["merge_error"] < 1
    assert summed["merge_lacks"] > 0.05
    assert summed["tail"] >= seen["tail"]


def test_no_rank_shows_in_what_is_sent(sketched: Callable[..., RunConfig]) -> None:
    _, watched = run(sketched("run", *UNLIKE, "rounds=1"))
    sizes: dict[tuple[int, str], set[int]] = {}
    turn: dict[tuple[int, str], int] = {}
    for partition, reply in watched.heard:
        phase = str(reply.manifest["phase"])
        at = turn[partition, phase] = turn.get((partition, phase), 0) + 1
        sizes.setdefault((at, phase), set()).add(reply.size_bytes)
    assert all(len(found) == 1 for found in sizes.values())
    assert {(1, "keys"), (1, "again"), (2, "input"), (2, "opening")} <= set(sizes)


@dataclass
class Twice(Watched):
    """A transport that loses, from a phase of the second sum on, the answers of those who are `late`."""

    late_from: Mapping[int, str] = field(default_factory=dict)
    phases: list[str] = field(default_factory=list)

    def exchange(
        self, requests: Mapping[int, Packet], timeout_seconds: float
    ) -> Iterator[tuple[int, Packet | Failure]]:
        self.phases.append(str(next(iter(requests.values())).manifest.get("phase", "keys")))
        if "again" in self.phases:
            self.silent = self.late_from
        yield from super().exchange(requests, timeout_seconds)
        if self.phases[-1] == "opening":
            self.silent, self.gone, self.phases = {}, set(), []


def watched_run(config: RunConfig, kind: type[Watched], **more: Any) -> tuple[list[dict[str, Any]], Watched]:
    folder = folder_for(config)
    watched = kind(LocalTransport(5, lambda p: site_of(config, p), FolderMemory(folder.root / "memories")), **more)
    return federate(config, folder, watched, engine="local"), watched


def test_a_client_that_is_not_in_the_first_sum_is_in_neither(
    sketched: Callable[..., RunConfig], tmp_path: Path
) -> None:
    (record,) = rounds_of(run(sketched("run", "rounds=1"), silent={4: "input"})[0])
    assert [client["partition"] for client in record["clients"]] == [0, 1, 2, 3]
    run(sketched("plain", "rounds=1", *PLAIN), silent={4: "keys"})
    assert distance(tmp_path / "run", tmp_path / "plain") < 2e-4


@pytest.mark.parametrize("phase", ["again", "shares", "input"])
def test_where_one_falls_silent_between_the_sums_products_stay_and_all_else_goes_on(
    sketched: Callable[..., RunConfig], tmp_path: Path, phase: str, caplog: pytest.LogCaptureFixture
) -> None:
    records, _ = watched_run(sketched("run", "rounds=1"), Twice, late_from={4: phase})
    (record,) = rounds_of(records)
    assert [client["partition"] for client in record["clients"]] == [0, 1, 2, 3, 4]
    assert [failure["partition"] for failure in record["failures"]] == [4]
    assert record["merge_error"] is None
    assert "all 5 of the first sum" in caplog.text
    run(sketched("whole", "rounds=1"))
    found, whole = weights(tmp_path / "run"), weights(tmp_path / "whole")
    for key, value in found.items():
        if "lora_B" in key:
            assert np.abs(value).max() < 1e-6  # as at the start
        elif "lora_" not in key:
            np.testing.assert_allclose(value, whole[key], atol=2e-4)


def test_the_round_after_a_second_sum_that_failed_has_both(sketched: Callable[..., RunConfig], tmp_path: Path) -> None:
    @dataclass
    class Once(Twice):
        def exchange(
            self, requests: Mapping[int, Packet], timeout_seconds: float
        ) -> Iterator[tuple[int, Packet | Failure]]:
            first = next(iter(requests.values()))
            if first.manifest["round"] > 1:
                self.late_from, self.silent, self.gone = {}, {}, set()
            yield from super().exchange(requests, timeout_seconds)

    records, _ = watched_run(sketched("run"), Once, late_from={4: "again"})
    assert [record["merge_error"] is None for record in rounds_of(records)] == [True, False]
    assert [len(record["failures"]) for record in rounds_of(records)] == [1, 0]


def test_clients_open_no_second_sum_of_fewer_than_the_first(
    sketched: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that asked for one would read the missing client's products from the difference."""
    opened = secure_rounds._opened

    def careless(*args: Any, among: tuple[int, ...] = (), **more: Any) -> Any:
        return opened(*args, **more)

    monkeypatch.setattr(secure_rounds, "_opened", careless)
    records, watched = watched_run(sketched("run", "rounds=1"), Twice, late_from={4: "input"})
    assert rounds_of(records)[0]["merge_error"] is None
    refused = [str(reply.manifest["reason"]) for _, reply in watched.heard if reply.kind == "failure"]
    assert len(refused) == 4
    assert all("expected the 5 clients of the first sum, found 4" in reason for reason in refused)
    phases = [reply.manifest.get("phase") for _, reply in watched.heard]
    assert phases.count("opening") == 5
    assert phases.count("input") == 9


def test_bases_that_make_products_longer_are_refused(sketched: Callable[..., RunConfig]) -> None:
    def altered(partition: int, packet: Packet) -> Packet:
        if packet.manifest.get("phase") != "again":
            return packet
        return replace(packet, body=(100 * np.frombuffer(packet.body, "<f4")).astype("<f4").tobytes())

    _, watched = run(sketched("run", "rounds=1"), altered=altered)
    refused = [str(reply.manifest["reason"]) for _, reply in watched.heard if reply.kind == "failure"]
    assert len(refused) == 5
    assert all("expected orthonormal columns, found columns that are 1e+04 from that" in reason for reason in refused)


@pytest.mark.parametrize(("cut", "words"), [(slice(0, -4), "bytes"), (slice(0, 0), "bytes, found 0")])
def test_bases_that_are_cut_short_are_refused(sketched: Callable[..., RunConfig], cut: slice, words: str) -> None:
    def altered(partition: int, packet: Packet) -> Packet:
        return replace(packet, body=packet.body[cut]) if packet.manifest.get("phase") == "again" else packet

    _, watched = run(sketched("run", "rounds=1"), altered=altered)
    refused = [str(reply.manifest["reason"]) for _, reply in watched.heard if reply.kind == "failure"]
    assert len(refused) == 5
    assert all(reason.startswith("bases of partition") and words in reason for reason in refused)


@pytest.mark.parametrize("phase", ["keys", "shares", "input", "confirmation"])
def test_a_second_sum_before_the_first_is_confirmed_is_refused(sketched: Callable[..., RunConfig], phase: str) -> None:
    def altered(partition: int, packet: Packet) -> Packet:
        asked = packet.manifest.get("phase", "keys" if packet.kind == "fit" else "")
        if partition == 4 and asked == phase and packet.kind == "secure":
            return replace(packet, manifest={**packet.manifest, "phase": "again", "invitation": "00"})
        return packet

    if phase == "keys":  # nobody has been asked to train
        config = sketched("run", "rounds=1")
        inner = LocalTransport(5, lambda p: site_of(config, p), FolderMemory(folder_for(config).root / "memories"))
        watched = Watched(inner, altered=lambda p, packet: replace(packet, kind="secure") if p == 4 else packet)
        federate(config, folder_for(replace(config, out=f"{config.out}-2")), watched, engine="local")
        (reason,) = {str(r.manifest["reason"]) for p, r in watched.heard if r.kind == "failure" and p == 4}
        assert "expected one of shares, input, confirmation, opening" in reason
        return
    records, watched = run(sketched("run", "rounds=1"), altered=altered)
    (reason,) = {str(reply.manifest["reason"]) for p, reply in watched.heard if reply.kind == "failure" and p == 4}
    assert "expected a first sum of this round that this client has confirmed" in reason
    assert rounds_of(records)


def test_products_are_forgotten_once_their_sum_is_open(sketched: Callable[..., RunConfig], tmp_path: Path) -> None:
    def kept(root: Path) -> list[bool]:
        files = [path for path in (root / "memories").rglob("*") if path.is_file()]
        assert files
        return [_PRODUCTS.encode() in path.read_bytes() for path in files]

    run(sketched("run", "rounds=1"))
    assert not any(kept(tmp_path / "run"))
    watched_run(sketched("cut", "rounds=1"), Twice, late_from={4: "input"})
    assert any(kept(tmp_path / "cut"))


def test_a_server_that_dies_between_the_sums_stops_and_says_what_to_do(
    sketched: Callable[..., RunConfig], tmp_path: Path
) -> None:
    class Killed(BaseException):
        """Stands for a kill: nothing in the run catches it."""

    @dataclass
    class Dying(Watched):
        def exchange(
            self, requests: Mapping[int, Packet], timeout_seconds: float
        ) -> Iterator[tuple[int, Packet | Failure]]:
            yield from super().exchange(requests, timeout_seconds)
            if "again" in {packet.manifest.get("phase") for packet in requests.values()}:
                raise Killed

    with pytest.raises(Killed):
        watched_run(sketched("cut"), Dying)
    folder, again = reopen(tmp_path / "cut", [])
    inner = LocalTransport(5, lambda p: site_of(again, p), FolderMemory(folder.root / "memories"))
    with pytest.raises(QuorumError, match="whose sum is open, found round 1 again; begin a new run"):
        federate(again, folder, Watched(inner), engine="local", resume=True)


def test_an_update_that_is_too_long_is_shortened_as_a_whole(sketched: Callable[..., RunConfig], tmp_path: Path) -> None:
    records, _ = run(sketched("run", "rounds=1", "federation.channel.secure.clip_norm=0.01"))
    (record,) = rounds_of(records)
    assert min(client["update_norm"] for client in record["clients"]) > 0.02
    product: dict[str, list[np.ndarray]] = {}
    for key, value in weights(tmp_path / "run").items():
        product.setdefault(key.partition(".lora_")[0], []).append(value)
    pairs = [pair for pair in product.values() if len(pair) == 2]
    length = np.sqrt(sum(np.linalg.norm(b @ a) ** 2 for a, b in pairs))
    assert 0 < length <= 0.0101 * 5.0 / 2.0  # stock peft divides by the scale
