"""Private runs on nodes that stay warm, on TLS with node keys: the bytes of the in-process engine, killed or not."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from fedpeft import journal
from fedpeft.runs import RunFolder
from tests.engines.conftest import adapter
from tests.engines.private import CENTRAL, EXAMPLE, LOCAL, SUMS
from tests.faults.world import PATIENT, World, rounds

pytestmark = [pytest.mark.engines, pytest.mark.assets, pytest.mark.faults]

PAIR = ("federation.channel.secure.least_cohort=2", "federation.channel.secure.dropout=0", "rounds=1")


def test_a_run_with_noise_of_the_server_that_is_killed_has_paid_and_goes_on_to_the_same_bytes(
    world: World, in_process: Callable[..., bytes]
) -> None:
    out = world.federation.lab.root / "central"

    def strike(world: World) -> None:
        for process in world.server_app():
            process.kill()

    said = world.run(out, *CENTRAL, strike=strike)
    assert "the process of the run's server is gone" in said
    paid = RunFolder(out).ledger.read_bytes().splitlines()
    assert len(paid) >= len(rounds(out)) == 3
    assert adapter(out) == in_process(*PATIENT, *CENTRAL)


def test_sums_that_nodes_sign_for_peers_they_know_give_the_bytes_of_sums_without_keys(
    world: World, in_process: Callable[..., bytes]
) -> None:
    out, private = world.federation.lab.root / "sums", (*PAIR, *SUMS, *EXAMPLE)
    world.run(out, *private, "federation.channel.secure.signed=true")
    (record,) = rounds(out)
    assert not record["failures"]
    assert {client["rank"] for client in record["clients"]} == {0}
    assert adapter(out) == in_process(*PATIENT, *private)


def test_nodes_add_noise_of_their_own(world: World) -> None:
    out = world.federation.lab.root / "local"
    world.run(out, *LOCAL, "rounds=1")
    start, (record,) = journal.read(RunFolder(out).journal)[0], rounds(out)
    noise = 0.02 * start["adapter"]["trainable_parameters"] ** 0.5
    assert all(0.9 * noise < client["update_norm"] < 1.1 * noise for client in record["clients"])
    assert record["epsilon"] > 0
