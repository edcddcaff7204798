"""A coded update on its way: from settings to a client, over the wire, to the server, and what the client keeps."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fedpeft import feedback
from fedpeft.adapters import AdapterSpec, AdapterState, ModuleSpec, at_rank, norm
from fedpeft.client import handle
from fedpeft.codecs import Codec, coded, dense, steps, top_k, zstd
from fedpeft.config import choose
from fedpeft.config.codecs import CODECS
from fedpeft.config.privacy import PRIVACY
from fedpeft.errors import PacketError
from fedpeft.privacy import Population
from fedpeft.requests import fit_request
from fedpeft.strategy import Strategy, build
from fedpeft.updates import Memory, Update
from fedpeft.wire import Packet, read_update
from tests.toys import (
    RUN,
    WIDE,
    WIDE_SESSION,
    Toy,
    counted,
    federate,
    flat,
    parts,
    plan,
    site,
    wide_state,
)

ROUNDED = coded(rounding=steps(15, 64, "stochastic"))
START = Memory({}, {"position": 1})
"""So that a third of the way is walked, and no number is one that few bits hold."""

KINDS = ("bf16", "int8", "int4", "int2", "ternary", "top_k", "low_rank", "zstd", "top_k+int4+zstd")


def strategy(codec: Codec, seed: int = 3) -> Strategy:
    return build(replace(parts(), codec=codec, seed=seed))


def answered(codec: Codec, memory: Memory, round_: int = 1, partition: int = 0) -> tuple[Packet, Memory, Update]:
    """The reply of a client to the toys' wide adapter, its memory after it, and what the server reads."""
    chosen = strategy(codec)
    request = fit_request(chosen, wide_state(round_ - 1), WIDE_SESSION, partition)
    reply, kept = handle(request, memory, site(partition, chosen, Toy(partition, spec=WIDE)))
    assert reply.kind == "update", reply.manifest
    return reply, kept, read_update(reply, chosen, WIDE, {**WIDE_SESSION.manifest(round_), "partition": partition})


@pytest.mark.parametrize("kind", KINDS)
def test_every_codec_of_the_settings_brings_an_update_to_the_server_in_the_bytes_it_promises(kind: str) -> None:
    codec = choose(CODECS, kind).chosen.build()
    reply, _, update = answered(codec, START)
    wanted = answered(coded(), START)[2]
    assert len(reply.body) <= codec.size(WIDE)
    error = norm({key: value - update.delta[key] for key, value in wanted.delta.items()}) / norm(wanted.delta)
    assert update.metrics.get(feedback.ERROR, 0.0) == pytest.approx(error)
    assert (error == 0) == codec.exact
    assert np.array_equal(update.delta["head.weight"], wanted.delta["head.weight"])
    assert error < 1.2


def test_of_a_client_that_says_nothing_nothing_is_coded_and_nothing_counts_as_lost() -> None:
    chosen = strategy(coded(top_k(0.1), remembers=True))
    spoken, kept, _ = answered(chosen.codec, START)
    whole = answered(coded(), START)[2]
    quiet = replace(whole, delta={key: np.zeros_like(value) for key, value in whole.delta.items()}, silent=True)
    manifest = {**WIDE_SESSION.manifest(2), "partition": 0}
    packet, memory = feedback.reply(chosen, quiet, kept, manifest, 2)
    assert spoken.body
    assert packet.body == b""
    assert feedback.ERROR not in packet.manifest
    assert memory is kept


def test_an_exact_codec_reports_no_error() -> None:
    assert feedback.ERROR not in answered(coded(entropy=zstd(3)), START)[2].metrics


def test_rounding_is_drawn_anew_for_each_seed_round_and_client_and_for_nothing_else() -> None:
    def body(seed: int, round_: int, partition: int) -> bytes:
        chosen = strategy(ROUNDED, seed)
        request = fit_request(chosen, wide_state(round_ - 1), WIDE_SESSION, partition)
        # Every client trains the same, so that only the draws tell replies apart.
        return handle(request, Memory(), site(partition, chosen, Toy(0, spec=WIDE)))[0].body

    seen = {body(seed, round_, partition) for seed in (0, 1) for round_ in (1, 2) for partition in (0, 1)}
    assert len(seen) == 8
    assert body(1, 2, 1) == body(1, 2, 1)


def test_what_was_lost_is_sent_with_the_next_update() -> None:
    codec = coded(top_k(0.1), remembers=True)
    _, memory, one = answered(codec, START)
    whole = answered(coded(), START)[2]
    lost = {key: value - one.delta[key] for key, value in whole.delta.items()}
    kept = {key.removeprefix(feedback.RESIDUAL): value for key, value in memory.tensors.items()}
    assert kept.keys() == lost.keys()
    assert all(np.array_equal(kept[key], lost[key]) for key in kept)
    assert norm(lost) > 0
    _, after, two = answered(codec, memory, 2)
    second = answered(coded(), Memory({}, memory.fields), 2)[2]
    owed = {key: value + lost[key] for key, value in second.delta.items()}
    for key, value in after.tensors.items():
        name = key.removeprefix(feedback.RESIDUAL)
        assert np.array_equal(value, owed[name] - two.delta[name])
    # No codec remembers where it is not asked to.
    assert not answered(coded(top_k(0.1)), START)[1].tensors


def test_a_client_of_lower_rank_is_owed_what_its_rank_can_hold() -> None:
    codec = coded(top_k(0.1), remembers=True)
    memory = answered(codec, START)[1]
    chosen = strategy(codec)
    request = fit_request(chosen, wide_state(1), WIDE_SESSION, 0, 2)
    reply, after = handle(request, memory, site(0, chosen, Toy(0, spec=WIDE)))
    update = read_update(reply, chosen, at_rank(WIDE, 2), {**WIDE_SESSION.manifest(2), "partition": 0})
    assert update.delta["left.A"].shape == (2, 7)
    assert after.tensors[f"{feedback.RESIDUAL}left.A"].shape == (2, 7)


@pytest.mark.parametrize("damage", [lambda body: body[:-1], lambda body: bytes([body[0] ^ 1]) + body[1:]])
def test_a_coded_update_that_was_damaged_is_refused_in_words(
    damage: Callable[[bytes], bytes],
) -> None:
    chosen = strategy(ROUNDED)
    request = fit_request(chosen, wide_state(), WIDE_SESSION, 0)
    reply, _ = handle(request, START, site(0, chosen, Toy(0, spec=WIDE)))
    with pytest.raises(PacketError, match=r"coded payload: expected .*, found .*; send it again"):
        read_update(replace(reply, body=damage(reply.body)), chosen, WIDE, {**WIDE_SESSION.manifest(1), "partition": 0})


def test_control_variates_beside_a_coded_update_travel_as_they_are() -> None:
    chosen = build(replace(parts(), codec=coded(rounding=steps(3, 64, "nearest"), entropy=zstd(3)), controls=2))
    first = chosen.init(RUN, 0, AdapterState(WIDE, counted()))
    reply, _ = handle(fit_request(chosen, first, WIDE_SESSION, 1), START, site(1, chosen, Toy(1, spec=WIDE)))
    update = read_update(reply, chosen, WIDE, {**WIDE_SESSION.manifest(1), "partition": 1})
    assert all((value == 2).all() for value in update.control.values())


def test_the_journal_counts_the_bytes_that_were_coded(tmp_path: Path) -> None:
    made, sizes = plan(session=WIDE_SESSION, rounds=1), []
    for codec in (dense(), ROUNDED):
        root = tmp_path / str(len(sizes))
        federate(root, made, plan=strategy(codec), first=wide_state())
        line = json.loads((root / "journal.jsonl").read_text().splitlines()[1])
        sizes.append(line["bytes_up"])
        assert line["bytes_up"] == sum(client["bytes_up"] for client in line["clients"])
        assert all((feedback.ERROR in client) == (codec is ROUNDED) for client in line["clients"])
    # Two clients, and each says one figure more: its name and eight bytes.
    more = len(f"metric.{feedback.ERROR}") + 8
    assert sizes[0] - sizes[1] == 2 * (4 * WIDE.parameters - ROUNDED.size(WIDE) - more)


def test_under_central_privacy_the_server_clips_what_it_decodes() -> None:
    """Ternary rounding makes an update of norm 1 longer; its part in what is released is no longer than the clip."""
    random, codec = np.random.default_rng(0), coded(rounding=steps(3, 64, "stochastic"))
    mechanism = PRIVACY.members["central"](noise_multiplier=1e-9, clip_norm=1.0, entropy="seed").build(Population(9, 3))
    wide = AdapterSpec("base", "full", (ModuleSpec("head", "full", 0, 1.0, (("weight", (60,)),)),))
    chosen = build(replace(parts(), codec=codec, mechanism=mechanism))
    delta = random.standard_normal(60).astype(np.float32)
    sent = {"head.weight": delta / np.float32(np.linalg.norm(delta))}
    decoded = codec.decode(codec.encode(sent, wide, random), wide)
    assert norm(decoded) > 1.5
    first = chosen.init(RUN, 0, AdapterState(wide, {"head.weight": np.zeros(60, np.float32)}))
    after, _ = chosen.aggregate(first, [Update(wide, decoded, 1, 1)])
    assert norm(after.adapter.tensors) == pytest.approx(1 / 3, rel=1e-5)


@pytest.mark.parametrize("codec", [ROUNDED, coded(top_k(0.4), steps(15, 64, "stochastic"), zstd(3), remembers=True)])
def test_a_run_that_stops_and_goes_on_ends_where_one_does_that_never_stopped(tmp_path: Path, codec: Codec) -> None:
    chosen, start = strategy(codec), wide_state()
    made = plan(session=WIDE_SESSION, rounds=4)
    whole = federate(tmp_path / "whole", made, plan=chosen, first=start)
    federate(tmp_path / "parts", replace(made, rounds=2), plan=chosen, first=start)
    again = federate(tmp_path / "parts", made, plan=chosen, first=start)
    assert again.round == whole.round == 4
    assert flat(again.adapter.tensors) == flat(whole.adapter.tensors)
    # The draws are in there: without them the same run ends elsewhere.
    other = federate(tmp_path / "other", made, plan=strategy(codec, 4), first=start)
    assert flat(other.adapter.tensors) != flat(whole.adapter.tensors)
