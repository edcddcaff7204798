"""Runs whose server sees sums alone: the same mean, clients that fall silent, refusals, and what is on record."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedpeft import journal
from fedpeft.client import Site
from fedpeft.config import RunConfig
from fedpeft.engines.local import LocalTransport
from fedpeft.errors import ConfigError, PlanError, QuorumError
from fedpeft.experiment import site_of, strategy_of
from fedpeft.federate import federate
from fedpeft.memory import FolderMemory
from fedpeft.node_key import peer_keys, private_key
from fedpeft.privacy import ledger
from fedpeft.privacy.secure.keys import pinned, signing
from fedpeft.runs import folder_for, reopen
from fedpeft.secure_client import Identity
from fedpeft.secure_rounds import _attempt
from fedpeft.wire import Failure, Packet
from server.make_certificates import make_certificates
from tests.privacy.sums import Watched, rounds_of, run, weights

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(("rule", "turns"), [("ffa_lora", 1), ("rolora", 1), ("fedavg", 2)])
def test_the_adapter_is_that_of_the_plain_channel_but_for_rounding(
    plan: Callable[..., RunConfig], tmp_path: Path, rule: str, turns: int
) -> None:
    more = (f"aggregation.merge.rule={rule}", f"aggregation.merge.{rule}.weights=uniform")
    more += (f"aggregation.stages.turns={turns}",)
    run(plan("secure", *more))
    run(plan("plain", *more, "federation.channel.kind=plain"))
    found, expected = weights(tmp_path / "secure"), weights(tmp_path / "plain")
    for key, value in expected.items():
        np.testing.assert_allclose(found[key], value, atol=2e-4)


def test_the_server_is_told_no_number_of_any_update(plan: Callable[..., RunConfig]) -> None:
    config = plan("run")
    _, watched = run(config)
    kinds = {reply.kind for _, reply in watched.heard}
    assert kinds == {"secured"}
    inputs = [reply for _, reply in watched.heard if reply.manifest["phase"] == "input"]
    bits = np.unpackbits(np.frombuffer(b"".join(reply.body[200:-64] for reply in inputs), np.uint8))
    assert abs(bits.mean() - 0.5) < 5 * 0.5 / np.sqrt(bits.size)


@pytest.mark.parametrize("phase", ["keys", "shares", "input", "confirmation", "opening"])
def test_a_client_that_falls_silent_leaves_a_sum_of_those_who_sent_theirs(
    plan: Callable[..., RunConfig], tmp_path: Path, phase: str
) -> None:
    records, _ = run(plan("run", "rounds=1"), silent={4: phase})
    (record,) = rounds_of(records)
    counted = [0, 1, 2, 3] if phase in ("keys", "shares", "input") else [0, 1, 2, 3, 4]
    assert [client["partition"] for client in record["clients"]] == counted
    if phase != "opening":
        assert {failure["partition"] for failure in record["failures"]} == {4}
    plain = plan("plain", "rounds=1", "federation.channel.kind=plain")
    folder = folder_for(plain)
    honest = LocalTransport(5, lambda p: site_of(plain, p), FolderMemory(folder.root / "memories"))
    away = Watched(honest, silent={} if len(counted) == 5 else {4: "keys"})
    federate(plain, folder, away, engine="local")
    found, expected = weights(tmp_path / "run"), weights(tmp_path / "plain")
    for key, value in expected.items():
        np.testing.assert_allclose(found[key], value, atol=2e-4)


def test_too_few_left_is_a_quorum_that_is_missed_and_nothing_is_opened(plan: Callable[..., RunConfig]) -> None:
    with pytest.raises(QuorumError, match="secure sum of round"):
        run(plan("run", "rounds=1"), silent={2: "input", 3: "input", 4: "input"})


def test_a_server_that_asks_for_a_smaller_cohort_than_the_client_wants_is_refused(
    plan: Callable[..., RunConfig],
) -> None:
    config = plan("run", "rounds=1")
    folder = folder_for(config)
    inner = LocalTransport(
        5, lambda p: replace(site_of(config, p), least_cohort=6), FolderMemory(folder.root / "memories")
    )
    watched = Watched(inner)
    with pytest.raises(QuorumError):
        federate(config, folder, watched, engine="local")
    assert {reply.kind for _, reply in watched.heard} == {"failure"}
    assert all("a cohort of 6 to 5 clients" in str(reply.manifest["reason"]) for _, reply in watched.heard)


@pytest.fixture
def keyed(tmp_path: Path) -> Callable[[RunConfig, FolderMemory], Callable[[int], Site]]:
    """Clients whose nodes have keys and know those of all others, from files as nodes have them."""
    make_certificates(tmp_path / "keys", ["localhost"], nodes=5, days=1)
    peers = peer_keys(tmp_path / "keys")

    def site(config: RunConfig) -> Callable[[int], Site]:
        def of(partition: int) -> Site:
            own = private_key(tmp_path / "keys" / f"node-{partition}")
            return replace(site_of(config, partition), identity=Identity(signing(own), pinned(peers)))

        return of

    return site


def with_keys(config: RunConfig, sites: Callable[[int], Site], **more: Any) -> tuple[list[dict[str, Any]], Watched]:
    folder = folder_for(config)
    watched = Watched(LocalTransport(5, sites, FolderMemory(folder.root / "memories")), **more)
    return federate(config, folder, watched, engine="local"), watched


SIGNED = ("rounds=1", "federation.channel.secure.signed=true")


def test_nodes_with_keys_sum_as_those_without_do(
    plan: Callable[..., RunConfig], keyed: Callable[..., Any], tmp_path: Path
) -> None:
    config = plan("signed", *SIGNED)
    with_keys(config, keyed(config))
    run(plan("plain", "rounds=1", "federation.channel.kind=plain"))
    for key, value in weights(tmp_path / "plain").items():
        np.testing.assert_allclose(weights(tmp_path / "signed")[key], value, atol=2e-4)


def test_a_node_that_knows_its_peers_takes_part_in_no_sum_without_signatures(
    plan: Callable[..., RunConfig], keyed: Callable[..., Any]
) -> None:
    config = plan("run", "rounds=1")
    with pytest.raises(QuorumError):
        with_keys(config, keyed(config))


def test_a_server_cannot_pass_for_a_client(plan: Callable[..., RunConfig], keyed: Callable[..., Any]) -> None:
    """It answers for partition 4 with keys of its own, which partition 4's node has not signed."""
    config = plan("run", *SIGNED)

    def altered(partition: int, packet: Packet) -> Packet:
        if packet.manifest.get("phase") != "shares" or partition == 4:
            return packet
        body = bytearray(packet.body)
        at = body.rindex(theirs[0])
        body[at : at + len(theirs[0])] = bytes(reversed(theirs[0]))
        return replace(packet, body=bytes(body))

    theirs: list[bytes] = []

    class Lying(Watched):
        def exchange(
            self, requests: Mapping[int, Packet], timeout_seconds: float
        ) -> Iterator[tuple[int, Packet | Failure]]:
            for partition, reply in super().exchange(requests, timeout_seconds):
                if partition == 4 and isinstance(reply, Packet) and reply.manifest.get("phase") == "keys":
                    theirs.append(reply.body[-96 - 32 : -96])
                yield partition, reply

    folder = folder_for(config)
    lying = Lying(LocalTransport(5, keyed(config), FolderMemory(folder.root / "memories")), altered=altered)
    with pytest.raises(QuorumError):
        federate(config, folder, lying, engine="local")
    reasons = [str(reply.manifest["reason"]) for _, reply in lying.heard if reply.kind == "failure"]
    assert len(reasons) == 4
    assert all("partition 4's signature on its keys, by the key registered for its node" in one for one in reasons)


def test_a_round_whose_sum_is_open_is_not_summed_again(plan: Callable[..., RunConfig], tmp_path: Path) -> None:
    """The difference of two sums of unlike clients would show an update; a round that was not opened may come again."""
    config = plan("run", "rounds=2")
    with pytest.raises(QuorumError):
        run(config, silent={2: "opening", 3: "opening", 4: "opening"})
    folder, again = reopen(tmp_path / "run", [])
    inner = LocalTransport(5, lambda p: site_of(again, p), FolderMemory(folder.root / "memories"))
    watched = Watched(inner)
    with pytest.raises(QuorumError):
        federate(again, folder, watched, engine="local", resume=True)
    said = [str(reply.manifest["reason"]) for _, reply in watched.heard if reply.kind == "failure"]
    assert said
    assert all("expected a round after 1, whose sum is open, found round 1 again" in one for one in said)


def test_a_round_that_was_cut_short_before_its_sum_was_opened_comes_again(
    plan: Callable[..., RunConfig], tmp_path: Path
) -> None:
    config = plan("run", "rounds=2")
    with pytest.raises(QuorumError):
        run(config, silent={2: "input", 3: "input", 4: "input"})
    folder, again = reopen(tmp_path / "run", [])
    inner = LocalTransport(5, lambda p: site_of(again, p), FolderMemory(folder.root / "memories"))
    records = federate(again, folder, Watched(inner), engine="local", resume=True)
    assert [len(record["clients"]) for record in rounds_of(records)] == [5, 5]


class Killed(BaseException):
    """Stands for a kill: nothing in the run catches it."""


@dataclass
class Dying(Watched):
    """A transport whose server dies in round 2, once it has all answers of phase `dies`."""

    dies: str = ""

    def exchange(
        self, requests: Mapping[int, Packet], timeout_seconds: float
    ) -> Iterator[tuple[int, Packet | Failure]]:
        yield from super().exchange(requests, timeout_seconds)
        asked = {(packet.manifest["round"], packet.manifest.get("phase", packet.kind)) for packet in requests.values()}
        if (2, self.dies) in asked:
            raise Killed


def killed_in(config: RunConfig, phase: str) -> None:
    folder = folder_for(config)
    inner = LocalTransport(5, lambda p: site_of(config, p), FolderMemory(folder.root / "memories"))
    with pytest.raises(Killed):
        federate(config, folder, Dying(inner, dies=phase), engine="local")


def resumed(root: Path) -> tuple[list[dict[str, Any]], Watched]:
    folder, config = reopen(root, [])
    watched = Watched(LocalTransport(5, lambda p: site_of(config, p), FolderMemory(folder.root / "memories")))
    return federate(config, folder, watched, engine="local", resume=True), watched


@pytest.mark.parametrize("phase", ["fit", "shares", "input", "confirmation"])
def test_a_server_that_is_killed_before_a_sum_is_open_goes_on_to_the_same_bytes(
    plan: Callable[..., RunConfig], tmp_path: Path, phase: str
) -> None:
    run(plan("whole"))
    killed_in(plan("cut"), phase)
    records, _ = resumed(tmp_path / "cut")
    assert [len(record["clients"]) for record in rounds_of(records)] == [5, 5]
    for key, value in weights(tmp_path / "whole").items():
        np.testing.assert_array_equal(weights(tmp_path / "cut")[key], value)


def test_a_server_that_is_killed_once_a_sum_is_open_stops_and_says_what_to_do(
    plan: Callable[..., RunConfig], tmp_path: Path
) -> None:
    killed_in(plan("cut"), "opening")
    with pytest.raises(QuorumError) as said:
        resumed(tmp_path / "cut")
    assert str(said.value).startswith("secure sum of round 2: expected enough clients in each of its exchanges")
    assert "whose sum is open, found round 2 again; begin a new run from the last adapter" in str(said.value)
    missed = journal.read(tmp_path / "cut" / "journal.jsonl")[-2]
    assert (missed["event"], missed["round"], len(missed["failures"])) == ("missed", 2, 5)


def test_phases_out_of_order_are_refused(plan: Callable[..., RunConfig]) -> None:
    def altered(partition: int, packet: Packet) -> Packet:
        if packet.manifest.get("phase") == "input" and partition == 1:
            return replace(packet, manifest={**packet.manifest, "phase": "opening"})
        return packet

    records, _ = run(plan("run", "rounds=1"), altered=altered)
    (record,) = rounds_of(records)
    assert [client["partition"] for client in record["clients"]] == [0, 2, 3, 4]
    (failure,) = [one for one in record["failures"] if one["partition"] == 1]
    assert "after the client has" in failure["reason"]


def test_what_is_on_record_is_what_was_said_in_clear_and_all_bytes_of_all_phases(
    plan: Callable[..., RunConfig],
) -> None:
    records, watched = run(plan("run", "rounds=1"))
    (record,) = rounds_of(records)
    for client in record["clients"]:
        sent = sum(reply.size_bytes for partition, reply in watched.heard if partition == client["partition"])
        assert client["bytes_up"] == sent
        assert client["loss"] > 0
        assert client["examples"] > 0
    assert "merge_error" not in record
    assert json.dumps(record)


def test_a_sum_of_unlike_ranks_hides_who_has_which(plan: Callable[..., RunConfig]) -> None:
    records, _ = run(plan("run", "rounds=1", "federation.ranks.rule=listed", "federation.ranks.listed.ranks=1,2,3"))
    (record,) = rounds_of(records)
    assert {client["rank"] for client in record["clients"]} == {0}
    assert len(record["clients"]) == 5


def test_clients_add_the_noise_that_the_server_cannot(plan: Callable[..., RunConfig], tmp_path: Path) -> None:
    noisy = ("privacy.mechanism=central", "privacy.central.sampler=reachable", "privacy.central.clip_norm=0.5")
    config = plan("run", "rounds=3", *noisy, "privacy.central.epsilon=8")
    noise = config.privacy.chosen.noise_multiplier
    records, _ = run(config)
    spent = [record["epsilon"] for record in rounds_of(records)]
    assert spent == sorted(spent)
    assert 7.5 < spent[-1] <= 8.0
    channel = strategy_of(config).channel
    assert channel is not None
    sizes = [record["update_norm"] for record in rounds_of(records)]
    assert min(sizes) > 0.2 * noise * 0.5 / 5
    assert ledger.paid(folder_root(config) / "privacy.jsonl", ())[0].sampler == "summed"


def folder_root(config: RunConfig) -> Path:
    return Path(config.out)


@pytest.mark.parametrize(
    ("override_text", "words"),
    [
        ("privacy.central.sampler=poisson", "set privacy.central.sampler=reachable"),
        ("privacy.central.adaptive=true", "set privacy.central.adaptive=false"),
        ("privacy.central.bands=3", "privacy.central.sampler"),
    ],
)
def test_what_sums_have_no_room_for_is_refused(plan: Callable[..., RunConfig], override_text: str, words: str) -> None:
    noisy = ("privacy.mechanism=central", "privacy.central.noise_multiplier=1", "privacy.central.sampler=reachable")
    with pytest.raises((PlanError, ConfigError), match=words):
        strategy_of(plan("run", *noisy, override_text))


def test_attempts_that_begin_in_the_same_moment_have_numbers_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    moments = iter([10.0, 10.01, 10.2, 10.2, 10.21, 10.3])
    monkeypatch.setattr("fedpeft.secure_rounds._EPOCH_SECONDS", 0)
    monkeypatch.setattr("fedpeft.secure_rounds.time.time", lambda: next(moments))
    monkeypatch.setattr("fedpeft.secure_rounds.time.sleep", lambda _: None)
    assert [_attempt(), _attempt()] == [81, 82]
