from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.errors import ConfigError, PlanError, RefusalError
from fedpeft.privacy.secure.policy import Policy, require_cohort, require_present, terms_for
from fedpeft.privacy.secure.terms import Terms, decode, encode, width_for

TERMS = Terms("run", 0, clients=10, degree=9, threshold=6, length=1, width=8)


def test_a_cohort_below_the_least_is_refused() -> None:
    require_cohort(Policy(least_cohort=10), TERMS, 10, "here")
    with pytest.raises(RefusalError, match=r"^here: expected a cohort of 11 to 10 clients, found 10; wait for more"):
        require_cohort(Policy(least_cohort=11), TERMS, 10, "here")


def test_more_clients_than_were_invited_are_refused() -> None:
    with pytest.raises(RefusalError, match="expected a cohort of 3 to 10 clients, found 11"):
        require_cohort(Policy(), TERMS, 11, "here")


def test_a_threshold_of_a_half_is_refused() -> None:
    require_cohort(Policy(), TERMS, 10, "here")
    with pytest.raises(RefusalError, match=r"expected a threshold above half of the 10 holders, .* found 5"):
        require_cohort(Policy(), replace(TERMS, threshold=5), 10, "here")


def test_a_threshold_above_the_holders_that_are_left_is_refused() -> None:
    with pytest.raises(RefusalError, match="above half of the 5 holders, and no more than all, found 6"):
        require_cohort(Policy(), TERMS, 5, "here")


def test_a_threshold_that_colluding_clients_undo_is_refused() -> None:
    # A third of ten are 3, and 2 · 7 > 10 + 3.
    league = Policy(colluding=1 / 3)
    require_cohort(league, replace(TERMS, threshold=7), 10, "here")
    with pytest.raises(RefusalError, match=r"40 bits of safety from a server with 3 of 10 clients, found 0\.0 bits"):
        require_cohort(league, TERMS, 10, "here")


def test_too_few_neighbours_are_refused() -> None:
    sparse = Terms("run", 0, clients=200, degree=12, threshold=8, length=1, width=8)
    with pytest.raises(RefusalError, match=r"40 bits of safety from a server with 0 of 200 .* threshold 8 of 13"):
        require_cohort(Policy(), sparse, 200, "here")
    require_cohort(Policy(), replace(sparse, degree=60, threshold=44), 200, "here")


def test_dropout_above_the_greatest_is_refused() -> None:
    policy = Policy(most_dropout=0.25)
    require_present(policy, TERMS, 10, range(8), range(10), "here")
    with pytest.raises(RefusalError, match="expected at least 8 of 10 clients, found 7"):
        require_present(policy, TERMS, 10, range(7), range(10), "here")


@pytest.mark.parametrize(("share", "missing"), [(0.3, 3), (0.7, 7), (0.1, 1), (0.29, 2), (1.0, 10), (0.0, 0)])
def test_a_share_of_the_clients_is_as_many_as_it_says(share: float, missing: int) -> None:
    assert Policy(least_cohort=2, most_dropout=share).least_present(10) == max(10 - missing, 2)
    assert Policy(colluding=min(share, 0.5)).colluders(100) == round(100 * min(share, 0.5))


def test_a_sum_of_fewer_than_the_least_cohort_is_refused() -> None:
    with pytest.raises(RefusalError, match="expected at least 7 of 10 clients, found 6"):
        require_present(Policy(least_cohort=7), TERMS, 10, range(6), range(10), "here")


def test_too_few_of_a_clients_own_holders_are_refused() -> None:
    with pytest.raises(RefusalError, match="expected at least 6 of the client's own 7 holders, found 5"):
        require_present(Policy(), TERMS, 10, range(8), (0, 1, 2, 3, 4, 8, 9), "here")


@given(st.integers(3, 90), st.floats(0, 0.2), st.sampled_from([0.0, 0.1, 1 / 3]))
def test_planned_terms_are_accepted_by_the_policy_that_they_were_planned_for(
    clients: int, dropout: float, colluding: float
) -> None:
    policy = Policy(colluding=colluding)
    try:
        terms = terms_for(policy, "run", 1, clients, 10, 20, dropout)
    except PlanError:
        assert 2 * (clients - dropout * clients) <= clients * (1 + colluding) + 4
        return
    require_cohort(policy, terms, clients, "here")
    assert terms.threshold <= clients - dropout * clients


def test_a_plan_with_too_much_dropout_is_refused_before_it_begins() -> None:
    with pytest.raises(PlanError, match=r"expected at least 6 of 10 clients that stay, .* found 5"):
        terms_for(Policy(), "run", 1, 10, 10, 20, 0.5)


@pytest.mark.parametrize(
    "fields",
    [{"least_cohort": 1}, {"most_dropout": 1.1}, {"most_dropout": -0.1}, {"colluding": 0.6}, {"failure_bits": 0.0}],
)
def test_a_policy_out_of_range_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"secure policy, {next(iter(fields))}: expected from"):
        Policy(**fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"run": ""},
        {"run": "A"},
        {"run": "a" * 65},
        {"round": -1},
        {"round": 2**31},
        {"clients": 1},
        {"clients": 100_001},
        {"degree": 0},
        {"degree": 10},
        {"degree": 2049, "clients": 5000},
        {"threshold": 1},
        {"threshold": 11},
        {"length": 0},
        {"length": 2**31 + 1},
        {"width": 1},
        {"width": 63},
    ],
)
def test_terms_out_of_range_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"secure sum, {next(iter(fields))}: expected"):
        replace(TERMS, **fields)


def test_terms_are_the_same_after_they_were_bytes_and_every_field_makes_another_session() -> None:
    assert decode(encode(TERMS)) == TERMS
    changes: list[dict[str, Any]] = [
        {"run": "other"},
        {"round": 1},
        {"clients": 11},
        {"degree": 8},
        {"threshold": 7},
        {"length": 2},
        {"width": 9},
        {"signed": False},
    ]
    sessions = {replace(TERMS, **change).session for change in changes}
    assert len(sessions) == len(changes)
    assert TERMS.session not in sessions
    with pytest.raises(ConfigError, match="secure sum, terms: expected"):
        decode(encode(TERMS) + b"\0")


def test_the_width_is_the_least_in_which_no_sum_wraps() -> None:
    # Three inputs from −5 to 5 give −15 … 15: five bits hold −16 … 15.
    assert width_for(3, 5) == 5
    # Three from −6 to 6 give −18 … 18.
    assert width_for(3, 6) == 6
    assert width_for(2, 1) == 3
