from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.config.data import PARTITIONS, ByLabel, BySize, Dirichlet, PartitionConfig
from fedpeft.config.fields import choose
from fedpeft.data.partitions import deal, histogram
from fedpeft.data.rows import Row
from fedpeft.errors import DataError

GROUPS = ("films", "microblog", "newspaper", "shops")


def make_rows(count: int) -> list[Row]:
    return [Row(f"t{index}", "abc"[index * 7 % 3], GROUPS[index % 4]) for index in range(count)]


def rule(name: str, **settings: object) -> PartitionConfig:
    members = {name: settings.pop("rule")} if "rule" in settings else {}
    return PartitionConfig(by=choose(PARTITIONS, name, **members), **settings)


every_rule = st.sampled_from(
    [
        rule("iid"),
        rule("dirichlet", rule=Dirichlet(5.0)),
        rule("label", rule=ByLabel(1)),
        rule("label", rule=ByLabel(3)),
        rule("group"),
        rule("size", rule=BySize(0.5)),
    ]
)


@given(every_rule, st.integers(120, 300), st.integers(3, 12), st.integers(0, 99))
def test_every_row_is_at_one_site_and_the_seed_decides_which(
    config: PartitionConfig, count: int, sites: int, seed: int
) -> None:
    rows = make_rows(count)
    dealt = deal(rows, config, sites, seed)
    assert len(dealt) == sites
    assert sorted(index for indices in dealt for index in indices) == list(range(count))
    assert all(list(indices) == sorted(indices) for indices in dealt)
    assert deal(rows, config, sites, seed) == dealt


@pytest.mark.parametrize("name", ["iid", "dirichlet", "label", "group", "size"])
def test_another_seed_deals_otherwise(name: str) -> None:
    rows = make_rows(240)
    assert deal(rows, rule(name), 6, 1) != deal(rows, rule(name), 6, 2)


@given(st.integers(1, 12), st.integers(24, 100))
def test_iid_sites_differ_by_at_most_one_row(sites: int, count: int) -> None:
    sizes = [len(indices) for indices in deal(make_rows(count), rule("iid"), sites, 0)]
    assert max(sizes) - min(sizes) <= 1


def test_twelve_sites_of_four_groups_are_three_of_each() -> None:
    rows = make_rows(240)
    dealt = deal(rows, rule("group"), 12, 0)
    assert [len(indices) for indices in dealt] == [20] * 12
    assert [{rows[index].group for index in indices} for indices in dealt] == [{GROUPS[site % 4]} for site in range(12)]


def test_fewer_sites_than_groups_hold_whole_groups() -> None:
    rows = make_rows(80)
    held = [{rows[index].group for index in indices} for indices in deal(rows, rule("group"), 3, 0)]
    assert held == [{"films", "shops"}, {"microblog"}, {"newspaper"}]


def test_rows_without_groups_cannot_be_dealt_by_group() -> None:
    with pytest.raises(DataError, match=r"columns\.group"):
        deal([Row("a", "x"), Row("b", "y")], rule("group"), 2, 0)


@given(st.integers(1, 3), st.integers(3, 9))
def test_a_site_holds_just_so_many_labels(each: int, sites: int) -> None:
    rows = make_rows(300)
    dealt = deal(rows, rule("label", rule=ByLabel(each)), sites, 0)
    assert all(len({rows[index].label for index in indices}) == each for indices in dealt)


@pytest.mark.parametrize(("each", "sites"), [(4, 3), (1, 2)])
def test_labels_that_cannot_be_shared_out_so_are_refused(each: int, sites: int) -> None:
    with pytest.raises(DataError, match=r"labels_per_site.*with 3 labels"):
        deal(make_rows(60), rule("label", rule=ByLabel(each)), sites, 0)


def test_a_lower_alpha_is_a_stronger_skew() -> None:
    rows = make_rows(600)

    def largest_share(alpha: float) -> float:
        dealt = deal(rows, rule("dirichlet", rule=Dirichlet(alpha), least_rows=10), 4, 0)
        return sum(max(histogram(rows, indices)["labels"].values()) / len(indices) for indices in dealt) / 4

    assert largest_share(100.0) < 0.5 < largest_share(0.1)


def test_dirichlet_draws_again_until_every_site_has_rows() -> None:
    smallest = [min(map(len, deal(make_rows(200), rule("dirichlet", least_rows=20), 5, seed))) for seed in range(10)]
    assert min(smallest) >= 20


def test_sizes_fall_by_rank() -> None:
    # 1 : 1/2 : 1/3 of 110 rows is 60, 30, 20.
    dealt = deal(make_rows(110), rule("size", rule=BySize(1.0)), 3, 0)
    assert [len(indices) for indices in dealt] == [60, 30, 20]


def test_a_cap_keeps_a_random_choice_of_what_the_site_had() -> None:
    rows = make_rows(240)
    whole = deal(rows, rule("group"), 4, 5)
    capped = deal(rows, rule("group", most_rows=10), 4, 5)
    assert [len(indices) for indices in capped] == [10] * 4
    assert all(set(few) < set(all_rows) for few, all_rows in zip(capped, whole, strict=True))
    assert capped != tuple(indices[:10] for indices in whole)


@pytest.mark.parametrize(
    "config",
    [rule("dirichlet", rule=Dirichlet(1e-6)), rule("size", rule=BySize(50.0)), rule("iid", least_rows=100)],
)
def test_a_site_with_too_few_rows_is_named(config: PartitionConfig) -> None:
    with pytest.raises(DataError, match=rf"by\.{config.by.name}: expected at least \d+ rows.*at site \d+; use fewer"):
        deal(make_rows(120), config, 8, 0)


def test_a_histogram_counts_labels_and_groups() -> None:
    rows = make_rows(8)
    assert histogram(rows, (0, 1, 4)) == {
        "rows": 3,
        "labels": dict(sorted(Counter(rows[index].label for index in (0, 1, 4)).items())),
        "groups": {"films": 2, "microblog": 1},
    }
    assert histogram([Row("a", "x")], (0,)) == {"rows": 1, "labels": {"x": 1}, "groups": {}}
