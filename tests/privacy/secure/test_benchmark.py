from __future__ import annotations

import pytest

from fedpeft.privacy.secure.simulation import PHASES
from simulations.benchmarks import secure


def test_every_phase_of_both_sides_is_timed_in_a_sum_that_is_exact() -> None:
    terms, numbers = secure.planned(5, 300, 1)
    cost = secure.measured(terms, secure.members_of(5, secure.Policy()), numbers, 1)
    assert set(cost.client) == set(cost.server) == set(cost.sent) == set(PHASES)
    assert all(seconds > 0 for seconds in (*cost.client.values(), *cost.server.values()))
    # 300 integers of 19 bits, the tally's four, 42 bytes of header and a signature of 96.
    assert cost.sent["input"] == -(-304 * terms.width // 8) + 42 + 96
    assert terms.width == 19


def test_the_command_prints_both_tables(capsys: pytest.CaptureFixture[str]) -> None:
    secure.main(clients=4, values=50, dropped=1, neighbours=[2, 3])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "4 clients, 1 dropped, 50 values of 18 bits: degree 3, threshold 3"
    assert [line.split()[0] for line in lines[2:8]] == [*PHASES, "all"]
    assert [line.split()[0] for line in lines[-2:]] == ["2", "3"]
