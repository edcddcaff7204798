from __future__ import annotations

import pytest

from fedpeft.config import RunConfig, override
from fedpeft.config.federation import RANKS, ByMemory, FederationConfig, Listed
from fedpeft.errors import ConfigError
from fedpeft.experiment import plan_of, ranks_of


def rules(*overrides: str) -> RunConfig:
    return override(RunConfig(), [f"federation.ranks{each}" for each in overrides])


@pytest.mark.parametrize(
    ("overrides", "asks", "said", "expected"),
    [
        ((), False, {"rank": 3}, [0, 0, 0, 0, 0]),
        (("=listed",), False, {"rank": 3}, [2, 4, 8, 16, 2]),
        (("=listed", ".listed.ranks=5,7"), False, {}, [5, 7, 5, 7, 5]),
        (("=declared",), True, {"rank": 3}, [3] * 5),
        (("=declared", ".declared.default=6"), True, {}, [6] * 5),
        (("=by_memory",), True, {"memory_bytes": 5 * 10**9}, [4] * 5),
        (
            ("=by_memory", ".by_memory.ranks=1,9", ".by_memory.gigabytes=0.5,2.5"),
            True,
            {"memory_bytes": 5 * 10**9},
            [9] * 5,
        ),
    ],
)
def test_settings_build_the_rule_that_they_say(
    overrides: tuple[str, ...], asks: bool, said: dict[str, int], expected: list[int]
) -> None:
    rule = ranks_of(rules(*overrides))
    assert rule.asks == asks
    assert [rule.rank(partition, said) for partition in range(5)] == expected


@pytest.mark.parametrize("name", sorted(RANKS.members))
def test_every_rule_of_the_table_can_be_built(name: str) -> None:
    assert all(rank >= 0 for rank in ranks_of(rules(f"={name}")).possible)


def test_the_plan_of_a_run_holds_its_ranks_and_its_bound() -> None:
    config = override(RunConfig(), ["federation.ranks=listed", "federation.most_update_norm=2.5"])
    plan = plan_of(config, "run", "spec")
    assert plan.asking.ranks.rank(1, {}) == 4
    assert plan.asking.most_norm == 2.5
    assert plan_of(RunConfig(), "run", "spec").asking.most_norm == 0.0


@pytest.mark.parametrize("ranks", [(), (0,), (4, -1)])
def test_ranks_are_one_or_more(ranks: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match=r"^ranks: expected ranks of 1 or more, found \("):
        Listed(ranks)
    with pytest.raises(ConfigError, match=r"^(ranks|gigabytes): expected"):
        ByMemory(ranks, tuple(map(float, ranks)))


@pytest.mark.parametrize("gigabytes", [(), (1.0,), (1.0, 2.0, 3.0), (2.0, 1.0)])
def test_each_rank_by_memory_has_its_memory_in_rising_order(gigabytes: tuple[float, ...]) -> None:
    with pytest.raises(ConfigError, match=r"^gigabytes: expected 2 numbers in rising order, one for each rank, found"):
        ByMemory((2, 4), gigabytes)
    assert ByMemory((2, 4), (1.0, 1.0)).gigabytes == (1.0, 1.0)


@pytest.mark.parametrize("bad", [-1.0, float("nan")])
def test_a_bound_on_updates_is_zero_or_above(bad: float) -> None:
    with pytest.raises(ConfigError, match=r"^most_update_norm: expected a number at least 0\.0, found"):
        FederationConfig(most_update_norm=bad)
