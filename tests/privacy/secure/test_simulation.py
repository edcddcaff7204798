from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeft.errors import QuorumError
from fedpeft.privacy.secure import fixed_point, messages, server
from fedpeft.privacy.secure.client_state import ClientState, from_bytes, to_bytes
from fedpeft.privacy.secure.discrete_gaussian import discrete_gaussian
from fedpeft.privacy.secure.packing import size_bytes
from fedpeft.privacy.secure.policy import Policy, terms_for
from fedpeft.privacy.secure.simulation import PHASES, Outcome, Script, simulate
from fedpeft.privacy.secure.terms import Terms, width_for
from tests.privacy.secure.harness import LENIENT, SIGNED, TERMS, at, inputs, members, run

SEVEN = Terms("run", 3, clients=7, degree=6, threshold=4, length=25, width=24, signed=False)
# 120 clients that choose 20 each; though 8 of them fall silent, 13 of 21 holders are left whichever they are.
SPARSE = Terms("run", 3, clients=120, degree=20, threshold=13, length=5, width=16, signed=False)


def exact(terms: Terms, found: Outcome, values: dict[int, np.ndarray]) -> tuple[int, ...]:
    """The survivors of a sum that was opened, once it has been found to be exact."""
    assert found.sum is not None, found.failure
    assert found.sum.total.tolist() == sum(values[one] for one in found.sum.survivors).tolist()
    return found.sum.survivors


@pytest.mark.parametrize("silent", range(4))
@pytest.mark.parametrize("phase", PHASES)
def test_the_sum_is_exact_whoever_falls_silent_down_to_the_threshold(phase: str, silent: int) -> None:
    values, gone = inputs(SEVEN), set(range(1, 1 + silent))
    found = run(SEVEN, Script({phase: gone}))
    # Who has sent an input is in the sum, though it says no more.
    assert exact(SEVEN, found, values) == tuple(
        one for one in range(7) if phase in ("confirmation", "opening") or one not in gone
    )
    assert not found.refusals


@pytest.mark.parametrize("phase", PHASES)
def test_no_sum_is_opened_below_the_threshold(phase: str) -> None:
    found = run(SEVEN, Script({phase: {0, 2, 4, 6}}))
    assert found.sum is None
    assert isinstance(found.failure, QuorumError)
    assert "secure sum of round 3" in str(found.failure)


def test_clients_fall_silent_in_every_phase_of_one_sum() -> None:
    terms = replace(SEVEN, clients=11, degree=10, threshold=6)
    found = run(terms, Script({phase: {number} for number, phase in enumerate(PHASES)}))
    assert exact(terms, found, inputs(terms)) == tuple(range(3, 11))
    assert found.sum is not None
    assert found.sum.dropped == (2,)


def test_node_keys_sign_and_the_sum_is_exact() -> None:
    found = run(SIGNED, Script({"input": {1}, "opening": {2}}))
    assert exact(SIGNED, found, inputs(SIGNED)) == (0, 2, 3, 4)


@pytest.mark.parametrize("phase", PHASES)
def test_with_random_neighbours_the_sum_is_exact_too(phase: str) -> None:
    found = run(SPARSE, Script({phase: set(range(0, 120, 17))}))
    exact(SPARSE, found, inputs(SPARSE))
    assert found.server is not None
    assert {len(shares) for shares in found.server.shares.values()} == {20}


def test_with_random_neighbours_a_client_without_enough_holders_left_fails_the_sum() -> None:
    found = run(SPARSE, Script({"opening": set(range(60))}))
    assert isinstance(found.failure, QuorumError)
    assert "expected 13 shares of partition" in str(found.failure)


@given(st.integers(2, 6), st.integers(2, 62), st.integers(1, 70), st.data())
@settings(max_examples=25)
def test_the_sum_is_exact_at_any_width_and_length(clients: int, width: int, length: int, data: st.DataObject) -> None:
    terms = Terms("run", 0, clients, clients - 1, clients // 2 + 1, length, width, signed=False)
    draw = np.random.default_rng(data.draw(st.integers(0, 99)))
    values = {
        one: draw.integers(-(2 ** (width - 1)), 2 ** (width - 1), length, dtype=np.int64) for one in range(clients)
    }
    found = simulate(terms, values, members(terms))
    assert found.sum is not None, found.failure
    # Beyond the width a sum wraps around, as modular noise may.
    half, whole = 2 ** (width - 1), 2**width
    expected = [(sum(int(one[at_]) for one in values.values()) + half) % whole - half for at_ in range(length)]
    assert found.sum.total.tolist() == expected


def test_adapters_are_summed_at_sixteen_bits_with_noise_on_the_grid() -> None:
    clients, grid, draw = 6, fixed_point.Grid(0.05, 16), np.random.default_rng(0)
    deltas = {one: draw.normal(0, 0.01, 2000).clip(-0.05, 0.05) for one in range(clients)}
    noise = {one: discrete_gaussian(900.0, 2000, draw.bytes) for one in range(clients)}
    values = {one: fixed_point.quantised(delta, grid, draw.bytes) + noise[one] for one, delta in deltas.items()}
    terms = terms_for(LENIENT, "run", 1, clients, 2000, width_for(clients, grid.levels + 600), signed=False)
    found = simulate(terms, values, members(terms)).sum
    assert found is not None
    error = fixed_point.real(found.total - sum(noise.values()), grid) - sum(deltas.values())
    assert float(np.abs(error).max()) < clients * grid.step


@pytest.mark.parametrize("width", [9, 20, 33])
def test_an_upload_is_the_packed_integers_and_little_more(width: int) -> None:
    terms = replace(SIGNED, length=20_000, width=width)
    found = run(terms)
    sent = [len(letter.data) for letter in found.transcript if letter.partition == 0 and letter.sent]
    assert sum(sent) <= 1.1 * size_bytes(terms.length, width)


def test_a_client_that_is_started_anew_before_every_message_goes_on() -> None:
    kept: dict[int, ClientState] = {}
    members_, values, registry = members(SIGNED), inputs(SIGNED), members(SIGNED)[0].registry
    from fedpeft.privacy.secure import client

    acts = (
        lambda one, state, data: client.advertise(members_[one], state, data),
        lambda one, state, data: client.share(members_[one], state, data),
        lambda one, state, data: client.mask(members_[one], state, data, values[one]),
        lambda one, state, data: client.confirm(members_[one], state, data),
        lambda one, state, data: client.unmask(members_[one], state, data),
    )

    def replies(phase: int, outbox: server.Outbox) -> list[tuple[int, bytes]]:
        answers = []
        for one, data in outbox.items():
            state, answer = acts[phase](one, from_bytes(to_bytes(kept.get(one, ClientState()))), data)
            assert from_bytes(to_bytes(state)) == state
            kept[one] = state
            answers.append((one, answer))
        return answers

    invited = dict.fromkeys(members_, messages.invitation(SIGNED))
    state, outbox = server.gather_keys(SIGNED, registry, set(members_), replies(0, invited))
    state, outbox = server.gather_shares(state, replies(1, outbox))
    state, outbox = server.gather_inputs(state, replies(2, outbox))
    state, outbox = server.gather_confirmations(state, replies(3, outbox))
    found = server.open_sum(state, replies(4, outbox))
    assert found.total.tolist() == sum(values.values()).tolist()


def test_one_round_after_another_with_the_same_clients() -> None:
    first = run(TERMS)
    following = replace(TERMS, round=4)
    second = simulate(following, inputs(following, 1), members(following), states=first.states)
    exact(following, second, inputs(following, 1))


def test_two_rounds_of_the_same_clients_share_no_key_and_no_mask() -> None:
    one, other = run(TERMS), run(replace(TERMS, round=4))
    for found in zip(one.states.values(), other.states.values(), strict=True):
        secrets = {getattr(state, name) for state in found for name in ("sealing", "masking", "seed")}
        assert len(secrets) == 6


def test_a_client_that_refuses_is_one_that_fell_silent() -> None:
    found = run(SEVEN, Script(to_client=at("input", {3}, lambda partition, data: data[:-1])))
    assert exact(SEVEN, found, inputs(SEVEN)) == (0, 1, 2, 4, 5, 6)
    assert set(found.refusals) == {3}


def test_the_default_policy_takes_the_terms_that_are_planned_for_it() -> None:
    terms = terms_for(Policy(), "run", 1, 10, 30, 20, dropout=0.3, signed=False)
    found = run(terms, Script({"input": {1, 5, 7}}), Policy())
    assert len(exact(terms, found, inputs(terms))) == 7
