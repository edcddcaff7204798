from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.ranks import RankRule, by_memory, declared, equal, listed, said_in
from fedpeft.wire import Packet

said = st.dictionaries(
    st.sampled_from(["rank", "memory_bytes", "more"]),
    st.integers() | st.booleans() | st.floats() | st.text(max_size=3) | st.none(),
)
RULES: dict[str, RankRule] = {
    "equal": equal(),
    "listed": listed((1, 3)),
    "declared": declared(4),
    "by_memory": by_memory((2, 4), (0.0, 8.0)),
}


def test_equal_nodes_have_the_servers_rank() -> None:
    assert [equal().rank(partition, {"rank": 9}) for partition in range(3)] == [0, 0, 0]
    assert equal().possible == (0,)


def test_a_list_is_counted_round_and_round() -> None:
    rule = listed((2, 4, 8))
    assert [rule.rank(partition, {}) for partition in range(7)] == [2, 4, 8, 2, 4, 8, 2]
    assert rule.possible == (2, 4, 8)


def test_only_rules_that_listen_ask() -> None:
    assert {name: rule.asks for name, rule in RULES.items()} == {
        "equal": False,
        "listed": False,
        "declared": True,
        "by_memory": True,
    }


@pytest.mark.parametrize("nothing", [{}, {"rank": 0}, {"rank": -3}, {"rank": True}, {"rank": 3.0}, {"rank": "3"}])
def test_a_node_that_declares_no_rank_has_the_default(nothing: dict[str, Any]) -> None:
    assert declared(4).rank(0, nothing) == 4


def test_a_node_that_declares_a_rank_has_it() -> None:
    assert [declared(4).rank(0, {"rank": rank}) for rank in (1, 3, 99)] == [1, 3, 99]
    assert 4 in declared(4).possible


@pytest.mark.parametrize(
    ("gigabytes", "expected"),
    [(0, 2), (0.999, 2), (1, 2), (3.999, 2), (4, 4), (7.5, 4), (8, 8), (1000, 8)],
)
def test_memory_decides(gigabytes: float, expected: int) -> None:
    rule = by_memory((2, 4, 8), (1.0, 4.0, 8.0))
    assert rule.rank(0, {"memory_bytes": int(gigabytes * 1e9)}) == expected
    assert {2, 4, 8} <= set(rule.possible)


def test_ranks_by_memory_need_not_rise() -> None:
    rule = by_memory((8, 2), (1.0, 4.0))
    assert [rule.rank(0, {"memory_bytes": int(size * 1e9)}) for size in (0, 2, 5)] == [8, 8, 2]


def test_a_node_may_want_less_than_its_memory_holds_and_no_more() -> None:
    rule = by_memory((2, 4, 8), (1.0, 4.0, 8.0))
    assert [rule.rank(0, {"memory_bytes": 5 * 10**9, "rank": rank}) for rank in (1, 3, 4, 6)] == [1, 3, 4, 4]


@pytest.mark.parametrize("memory", [True, 5.0e9, "5e9", -1, None])
def test_memory_that_is_no_number_of_bytes_counts_as_none(memory: object) -> None:
    assert by_memory((2, 4), (1.0, 4.0)).rank(0, {"memory_bytes": memory}) == 2  # type: ignore[dict-item]


@given(said, st.integers(0, 99))
@pytest.mark.parametrize("name", sorted(RULES))
def test_whatever_a_node_says_the_rank_is_an_integer(name: str, told: dict[str, Any], partition: int) -> None:
    rank = RULES[name].rank(partition, told)
    assert type(rank) is int
    assert rank >= 0


@pytest.mark.parametrize("name", ["declared", "by_memory"])
@pytest.mark.parametrize("size", [10**18, 10**30, 10**400], ids=["great", "greater", "vast"])
def test_absurd_numbers_are_only_great(name: str, size: int) -> None:
    rank = RULES[name].rank(0, {"rank": size, "memory_bytes": size})
    assert rank == {"declared": size, "by_memory": 4}[name]


def test_what_a_description_says() -> None:
    packet = Packet("description", {"rank": 3, "memory_bytes": 7, "round": 2})
    assert said_in(packet) == {"rank": 3, "memory_bytes": 7}
    assert said_in(Packet("description")) == {"rank": 0, "memory_bytes": 0}


@pytest.mark.parametrize("rule", [listed((3,)), listed((1, 3)), declared(4), by_memory((4,), (0.0,))])
def test_where_nodes_may_come_by_unlike_ranks_the_possible_ones_say_so(rule: RankRule) -> None:
    given = {rule.rank(partition, {"rank": partition + 1}) for partition in range(6)}
    assert (len(given) > 1) == (len(set(rule.possible)) > 1)
