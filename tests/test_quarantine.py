import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.errors import CheckpointError
from fedpeft.quarantine import (
    ABSENT,
    FAILED,
    LONGEST_REST,
    REFUSED,
    Budget,
    Offence,
    State,
    from_fields,
    noted,
    quarantined,
    to_fields,
)

BUDGET = Budget(most=3, window=10, rest=20)


def after(*kinds: str, state: State | None = None, first: int = 1, partition: int = 4) -> State:
    """The state after rounds in which the node failed in these ways, or did not ("")."""
    found = state or {}
    for number, kind in enumerate(kinds, start=first):
        offences = [Offence(partition, kind, f"in round {number}")] if kind else []
        found = noted(BUDGET, found, number, offences)
    return found


def test_three_refused_answers_bar_a_node_for_the_rest_and_no_longer() -> None:
    assert quarantined(after(REFUSED, REFUSED), 3) == {}
    state = after(REFUSED, REFUSED, REFUSED)
    assert [round_ for round_ in range(1, 40) if quarantined(state, round_)][-1] == 23
    assert quarantined(state, 4) == {
        4: "partition 4 is barred for the first time, up to round 23; its last failure: in round 3"
    }


def test_a_second_offence_bars_for_twice_as_long_and_a_third_for_four_times() -> None:
    once = after(REFUSED, REFUSED, REFUSED)
    twice = after(REFUSED, REFUSED, REFUSED, state=once, first=24)
    assert twice[4].until == 26 + 40
    assert after(REFUSED, REFUSED, REFUSED, state=twice, first=67)[4].until == 69 + 80


def test_a_node_that_is_away_is_never_barred_and_leaves_nothing_behind() -> None:
    assert after(*[ABSENT] * 100) == {}


def test_a_fault_that_the_node_admits_weighs_half() -> None:
    assert quarantined(after(*[FAILED] * 5), 6) == {}
    assert 4 in quarantined(after(*[FAILED] * 6), 7)


def test_failures_fall_out_of_the_window_and_are_forgotten() -> None:
    assert quarantined(after(REFUSED, REFUSED, *[""] * 9, REFUSED), 13) == {}
    assert after(REFUSED, *[""] * 10) == {}


def test_many_failures_in_one_round_count_once_and_the_gravest_does() -> None:
    offences = [Offence(1, ABSENT, "a"), Offence(1, REFUSED, "b"), Offence(1, FAILED, "c"), Offence(1, REFUSED, "d")]
    assert noted(BUDGET, {}, 1, offences)[1].failures == ((1, 1.0),)


def test_one_node_says_nothing_of_another() -> None:
    assert list(quarantined(after(REFUSED, REFUSED, REFUSED, state=after(REFUSED, partition=2)), 4)) == [4]


def test_what_comes_late_from_a_barred_node_does_not_lengthen_its_rest() -> None:
    barred = after(REFUSED, REFUSED, REFUSED)
    assert after(REFUSED, REFUSED, REFUSED, state=barred, first=4) == barred


def test_a_budget_of_nothing_bars_nobody() -> None:
    assert noted(Budget(most=0), {}, 1, [Offence(0, REFUSED, "x")]) == {}


def test_a_kind_that_nobody_knows_is_not_held_against_a_node() -> None:
    assert after("unheard-of", "unheard-of", "unheard-of") == {}


def test_reasons_are_cut_and_rests_are_bounded() -> None:
    budget, state = Budget(1, 1, 10**6), {}
    for _ in range(40):
        round_ = max((conduct.until for conduct in state.values()), default=0) + 1
        before, state = round_, noted(budget, state, round_, [Offence(0, REFUSED, "x" * 10**6)])
        assert state[0].until - before <= LONGEST_REST
    assert len(state[0].reason) == 200


@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from([ABSENT, FAILED, REFUSED])), max_size=60))
def test_a_state_survives_json_and_only_offenders_are_ever_barred(events: list[tuple[int, str]]) -> None:
    state: State = {}
    for round_, (partition, kind) in enumerate(events, start=1):
        state = noted(BUDGET, state, round_, [Offence(partition, kind, "why")])
        assert quarantined(state, round_ + 1).keys() <= {p for p, kind in events[:round_] if kind != ABSENT}
    assert from_fields(json.loads(json.dumps(to_fields(state)))) == state


@pytest.mark.parametrize(
    "fields", [[1], [[0, [[1]], 0, 0, ""]], [["a", [], 0, 0, ""]], 3, [[0, [], float("inf"), 0, ""]]]
)
def test_other_fields_are_refused(fields: object) -> None:
    with pytest.raises(CheckpointError, match="quarantine: expected"):
        from_fields(fields)  # type: ignore[arg-type]
