"""Members that are planted are found, guesses are no better than guesses, and games are fair."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fedpeft.config import RunConfig
from fedpeft.data.rows import Row
from fedpeft.errors import ConfigError, DataError
from fedpeft.experiment import deal_rows, site_examples
from simulations.privacy import figures, membership
from simulations.privacy.game import Game, alike, game_of, trained_on
from simulations.privacy.membership import Known, Membership, guessed, judged, sure, sureness
from simulations.privacy.recording import Recorded, public_of, record
from tests import tiny


def planted(rows: int = 400, shadows: int = 16) -> tuple[Known, np.ndarray]:
    """Rows of very unlike difficulty; an adapter is surer of a row that it was trained on by two deviations."""
    random = np.random.default_rng(0)
    truth = np.arange(rows) % 4 == 0
    ease, inside = 5 * random.standard_normal(rows), random.random((shadows, rows)) < 0.5
    levels = ease + 2.0 * inside + random.standard_normal((shadows, rows))
    target = ease + 2.0 * truth + random.standard_normal(rows)
    reference = ease + 3.0 * random.standard_normal(rows)
    return Known(target, reference, np.where(inside, np.nan, levels), np.where(inside, levels, np.nan)), truth


def area(scores: np.ndarray, truth: np.ndarray) -> float:
    return figures.auc(scores[truth], scores[~truth]).value


def test_what_is_known_of_a_rows_difficulty_tells_members_apart() -> None:
    known, truth = planted()
    found = {name: area(way.score(known), truth) for name, way in membership.WAYS.items()}
    best = 0.92  # of two normals two deviations apart: Φ(2 / √2)
    assert found["threshold"] < 0.7
    assert found["threshold"] + 0.03 < found["reference"] < found["lira_offline"] - 0.05
    assert found["lira_offline"] > 0.87
    assert best - 0.05 < found["lira_online"] <= best + 0.03


def test_the_online_ratio_is_that_of_the_two_normals() -> None:
    out = np.array([[0.0, 1.0], [2.0, 3.0], [1.0, 2.0]])
    inside = out + 4
    target = np.array([1.0, 6.0])
    found = membership.lira_online(Known(target, target, out, inside))
    # One variance, 1 (2 + 2 of squares over 6 − 2): means 1 and 2 without, 5 and 6 with.
    np.testing.assert_allclose(found, [(0 - 16) / 2, (16 - 0) / 2])


def test_a_row_that_no_shadow_had_counts_as_others_that_some_had() -> None:
    out = np.array([[0.0, 1.0], [2.0, 3.0], [1.0, 2.0]])
    inside = np.where(np.arange(2) == 0, out + 4, np.nan)
    found = membership.lira_online(Known(np.array([5.0, 6.0]), np.zeros(2), out, inside))
    np.testing.assert_allclose(found[0], found[1])
    assert found[0] > 0


def test_random_scores_find_members_no_better_than_chance() -> None:
    random = np.random.default_rng(1)
    truth = np.arange(3000) % 3 == 0
    found = {one.metric: one for one in judged("a", "b", random.standard_normal(3000), truth, 1e-5)}
    assert found["AUC"].low <= 0.5 <= found["AUC"].high
    assert found["members found at 1 % false"].low <= 0.01 <= found["members found at 1 % false"].high
    assert found["ε proved at δ = 1e-05"].value < 0.2
    assert found["ε proved at δ = 1e-05, by guesses of one run"].value < 0.2


def test_scores_that_tell_members_prove_a_large_epsilon() -> None:
    truth = np.arange(3000) % 3 == 0
    found = {one.metric: one for one in judged("a", "b", truth.astype(float), truth, 1e-5)}
    assert found["AUC"].value == 1.0
    assert found["members found at 0.1 % false"].value == 1.0
    assert found["ε proved at δ = 1e-05"].value > 5
    assert found["ε proved at δ = 1e-05, by guesses of one run"].value > 4


def test_the_surest_and_the_least_sure_are_guessed() -> None:
    members, others = np.array([9.0, 8, 7, 1]), np.array([6.0, 5, 2, 10])
    # The surest quarter is 10 (wrong) and 9; the least sure are 2 and 1 (wrong).
    assert guessed(members, others) == (2, 4)
    assert guessed(members[:1], others[:0]) == (0, 0)


def test_sureness_is_log_odds_of_labels_and_mean_log_likelihoods_of_answers() -> None:
    shares = np.array([0.9, 0.5, 0.01])
    np.testing.assert_allclose(sureness({"loss": -np.log(shares)}), np.log(shares / (1 - shares)))
    np.testing.assert_allclose(sureness({"loss": np.array([6.0, 1.0]), "tokens": np.array([3, 2])}), [-2.0, -0.5])
    assert math.isfinite(sureness({"loss": np.zeros(1)})[0])


def test_a_game_has_those_that_were_trained_on_and_others_like_them(recorded: tuple[RunConfig, Recorded]) -> None:
    config, run = recorded
    game = game_of(config, run, "final", 20)
    batched = {example for batch in run.batches.values() for example in batch}
    dealt = deal_rows(config)
    trained = {
        row.text
        for partition in range(3)
        for row, example in zip(dealt.sites[partition], site_examples(config, partition), strict=True)
        if example in batched
    }
    candidates = np.array([row.text for row in game.candidates])
    assert set(candidates[game.truth]) == trained
    assert 10 < len(trained) < 36  # not everybody was asked, and not for all
    others = set(candidates[~game.truth])
    assert not others & {row.text for site in dealt.sites for row in site}
    assert 15 <= len(others) <= 20
    assert not {row.text for row in game.public} & set(candidates)
    assert not {row.text for row in game.public} & {row.text for site in dealt.sites for row in site}
    assert 0 < game.truth[: len(game.truth) // 2].sum() < game.truth.sum()  # in no order


def test_the_members_of_a_clients_update_are_its_own_rows(recorded: tuple[RunConfig, Recorded]) -> None:
    config, run = recorded
    game = game_of(config, run, "client", 20)
    own = {row.text for row in deal_rows(config).sites[run.clients[-1].partition]}
    members = {row.text for row, member in zip(game.candidates, game.truth, strict=True) if member}
    assert members <= own
    assert game.view is run.clients[-1]


def test_non_members_have_the_labels_that_members_have() -> None:
    rows = [Row(f"a{at}", "yes" if at % 4 else "no") for at in range(8)]
    pool = [Row(f"b{at}", "yes" if at % 2 else "no") for at in range(40)]
    found = alike(rows, pool, 20, 0)
    assert len(found) == 20
    assert sum(row.label == "no" for row in found) == 5
    assert len({row.text for row in found}) == 20
    assert alike([Row("a", "maybe")], pool, 20, 0) == []


def test_a_game_without_rows_to_spare_is_refused(tiny_config: Callable[..., RunConfig]) -> None:
    config = tiny_config(rounds=1)
    with pytest.raises(DataError, match="rows that were trained on, and rows that were not"):
        game_of(config, record(config), "final", 0)


@pytest.fixture(scope="module")
def by_heart(tiny_model: Path, secrets: Path) -> RunConfig:
    """Labels that nothing but memory tells, learned until they are known."""
    return tiny.run_config(
        tiny_model,
        secrets,
        Path("nowhere"),
        rounds=3,
        adapter={"family": "lora", "lora": {"rank": 8, "alpha": 16.0}},
        data={"partition": {"most_rows": 16}},
        federation={"clients": 2, "cohort": 2},
        training={"steps": 90, "batch_size": 8, "learning_rate": 0.02},
        evaluation={"every": 0},
    )


@pytest.fixture(scope="module")
def game(by_heart: RunConfig) -> Game:
    return game_of(by_heart, record(by_heart), "final", 60)


def test_members_are_found_where_labels_are_known_by_heart(by_heart: RunConfig) -> None:
    settings = Membership(view="client", ways=("threshold", "lira_online"), shadows=4, non_members=60)
    found = {(one.attack, one.metric): one for one in settings.run(by_heart)}
    assert found["membership, threshold", "AUC"].value > 0.8
    assert found["membership, lira_online", "AUC"].value > 0.6
    assert found["membership, threshold", "AUC"].low > 0.6


def test_an_adapter_that_was_not_trained_finds_no_members(by_heart: RunConfig, game: Game) -> None:
    public = public_of(by_heart)
    scores = sure(public.adapted.initial, public, game.candidates, 64)
    found = figures.auc(scores[game.truth], scores[~game.truth])
    assert found.low <= 0.5 <= found.high


def test_shadows_are_trained_on_the_rows_that_they_are_given(by_heart: RunConfig, game: Game) -> None:
    rows = list(game.public[:24])
    adapter = trained_on(game, by_heart, rows)
    public = public_of(by_heart)
    inside, outside = (sure(adapter, public, chosen, 64).mean() for chosen in (rows, game.public[24:60]))
    assert inside > outside + 1


def test_the_account_of_a_private_run_stands_beside_what_is_proved() -> None:
    journal = [{"event": "start"}, *({"event": "round", "round": at, "epsilon": at / 2} for at in (1, 2, 3))]
    (found,) = membership.accounted(journal, "the final adapter", 1e-3)
    assert (found.metric, found.value, found.n) == ("ε accounted at δ = 0.001", 1.5, 3)
    assert membership.accounted([{"event": "round", "round": 1}], "the final adapter", 1e-3) == []


def test_a_way_that_is_not_known_is_refused() -> None:
    with pytest.raises(ConfigError, match="ways: expected some of threshold, reference"):
        Membership(ways=("guess",))
