"""What a server sees of the inputs: statistics over long inputs, whose places are masked independently."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from fedpeft.privacy.secure import keys, messages, statements
from fedpeft.privacy.secure.masks import summed
from fedpeft.privacy.secure.packing import unpack
from fedpeft.privacy.secure.simulation import Outcome, Script, simulate
from fedpeft.privacy.secure.terms import Terms
from tests.privacy.secure.harness import at, members

LENGTH = 200_000
TERMS = Terms("run", 0, clients=3, degree=2, threshold=2, length=LENGTH, width=16, signed=False)
TINY = replace(TERMS, width=2)


def summed_up(terms: Terms, values: dict[int, np.ndarray], seed: int, script: Script | None = None) -> Outcome:
    return simulate(terms, values, members(terms), script, entropy=np.random.default_rng(seed).bytes)


def masked(terms: Terms, found: Outcome) -> dict[int, np.ndarray]:
    """The inputs as the server receives them."""
    return {
        letter.partition: unpack(
            messages.read_input(terms, letter.partition, letter.data)[1], terms.words, terms.width
        )[: terms.length]
        for letter in found.transcript
        if letter.phase == "input" and letter.sent
    }


def unveiled(terms: Terms, found: Outcome) -> np.ndarray:
    """The inputs `(clients, length)` without each one's own mask, which the server takes off in the end."""
    assert found.server is not None
    context = statements.context(terms, found.server.roster)
    rows = []
    for partition, received in sorted(masked(terms, found).items()):
        key = keys.self_mask_key(found.states[partition].seed, context, partition)
        rows.append((received - summed(terms.words, terms.width, [key])[: terms.length]) % 2**terms.width)
    return np.array(rows)


def constant(*values: int) -> dict[int, np.ndarray]:
    return {partition: np.full(LENGTH, value) for partition, value in enumerate(values)}


def test_masked_inputs_are_uniform_whatever_the_inputs() -> None:
    found = masked(TERMS, summed_up(TERMS, constant(0, 7, -3), 1))
    for received in found.values():
        assert stats.chisquare(np.bincount(received // 64, minlength=1024)).pvalue > 1e-4
        assert stats.chisquare(np.bincount(received % 64, minlength=64)).pvalue > 1e-4
        assert stats.kstest(received / 2**16, "uniform").pvalue > 1e-4
        # Neighbouring places have nothing to do with each other.
        assert abs(np.corrcoef(received[:-1], received[1:])[0, 1]) < 5 / np.sqrt(LENGTH)


def test_masked_inputs_are_uniform_without_the_clients_own_masks_too() -> None:
    for received in unveiled(TERMS, summed_up(TERMS, constant(0, 7, -3), 2)):
        assert stats.chisquare(np.bincount(received // 64, minlength=1024)).pvalue > 1e-4


def joint(seed: int, *values: int) -> np.ndarray:
    """How often the server sees which three numbers modulo 4 together, `(64,)`."""
    rows = unveiled(TINY, summed_up(TINY, constant(*values), seed))
    counts: np.ndarray = np.bincount(rows[0] * 16 + rows[1] * 4 + rows[2], minlength=64)
    return counts


@pytest.mark.parametrize("other", [(1, 0, 0), (0, -1, -2), (-2, 1, -2)])
def test_two_sets_of_inputs_with_one_sum_look_the_same_to_the_server(other: tuple[int, int, int]) -> None:
    one, another = joint(3, 0, 0, 1), joint(4, *other)
    possible = one > 0
    assert possible.sum() == 16
    assert (possible == (another > 0)).all()
    assert stats.chi2_contingency(np.array([one[possible], another[possible]])).pvalue > 1e-4
    assert stats.chisquare(one[possible]).pvalue > 1e-4


def test_two_sets_of_inputs_with_other_sums_do_not() -> None:
    # The counterpart: the comparison can tell sets apart, by the one thing that the server is to learn.
    assert not ((joint(5, 0, 0, 1) > 0) & (joint(6, 0, 1, 1) > 0)).any()


def test_of_a_client_that_dropped_nothing_is_seen_though_its_mask_key_was_opened() -> None:
    # It fell silent with its input on the way: the server has that too, and every secret but its seed.
    late: dict[int, bytes] = {}

    def too_late(partition: int, data: bytes) -> bytes:
        late[partition] = data
        return b""

    found = summed_up(TERMS, constant(0, 7, -3), 7, Script(to_server=at("input", {2}, too_late)))
    assert found.sum is not None
    assert found.sum.dropped == (2,)
    received = unpack(messages.read_input(TERMS, 2, late[2])[1], TERMS.words, TERMS.width)[:LENGTH]
    context = statements.context(TERMS, found.server.roster if found.server else b"")
    entries = found.server.entries if found.server else {}
    pairs = [keys.mask_key(found.states[2].masking, entries[one].masking, context, one, 2) for one in (0, 1)]
    left = (received + summed(TERMS.words, TERMS.width, pairs)[:LENGTH]) % 2**16
    assert stats.chisquare(np.bincount(left // 64, minlength=1024)).pvalue > 1e-4
    own = summed(TERMS.words, TERMS.width, [keys.self_mask_key(found.states[2].seed, context, 2)])[:LENGTH]
    assert ((left - own) % 2**16 == 2**16 - 3).all()


def test_secrets_do_not_travel() -> None:
    found = summed_up(TERMS, constant(0, 7, -3), 8)
    letters = b"".join(letter.data for letter in found.transcript if letter.phase != "input")
    for state in found.states.values():
        for secret in (state.sealing, state.masking, state.seed):
            assert secret not in letters
    # Each client's share of its own seed is opened in the last phase, and no other before.
    before = b"".join(letter.data for letter in found.transcript if letter.phase not in ("input", "opening"))
    for state in found.states.values():
        assert state.own not in before
        assert not any(shares[:33] in letters for shares in state.held.values())
