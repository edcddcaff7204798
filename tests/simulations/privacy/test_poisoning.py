"""Federations on frozen features learn, hostile ones learn what attackers want, and tables say which rule withstood."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from fedpeft import journal
from fedpeft.adapters import AdapterState
from fedpeft.client import FitJob
from fedpeft.config import RunConfig, load, override, to_flat
from fedpeft.experiment import deal_rows, strategy_of
from fedpeft.randomness import rng
from fedpeft.runs import RunFolder, create
from fedpeft.updates import ServerState, Update
from fedpeft.wire import Transport
from simulations.privacy import features, findings, poisoning
from simulations.privacy.benches import (
    TRIGGER,
    Answers,
    FrozenFeatures,
    backdoored,
    on_models,
    poisoned,
    target_of,
)
from simulations.privacy.features import FeatureLearner, Features
from simulations.privacy.hostile import ATTACKS, hostile
from simulations.privacy.poisoning import Cell, Judged, Outcome, outcome_of, tables
from simulations.privacy.recording import record
from tests import tiny

SPEC = features.spec_of(6, 3, 2)


def moved(seed: int) -> AdapterState:
    return tiny.moved(features.drawn_adapter(SPEC, 0), seed)


def test_gradients_by_hand_are_those_of_differences() -> None:
    random, state = rng(0, "gradient"), moved(1)
    tensors = {key: value.astype(np.float64) for key, value in state.tensors.items()}
    inputs, labels = random.standard_normal((5, 6)), np.array([0, 1, 2, 0, 1])
    _, found = features.gradient(tensors, inputs, labels)
    for key, slope in found.items():
        for at in np.ndindex(slope.shape):
            nudged = {name: value.copy() for name, value in tensors.items()}
            nudged[key][at] += 1e-6
            up = features.gradient(nudged, inputs, labels)[0]
            nudged[key][at] -= 2e-6
            down = features.gradient(nudged, inputs, labels)[0]
            assert slope[at] == pytest.approx((up - down) / 2e-6, abs=1e-6)


def clusters(seed: int) -> Features:
    """Three kinds of rows that are easily told apart."""
    random, labels = rng(seed, "clusters"), np.arange(90) % 3
    centres = 3 * np.eye(6)[:3]
    return Features((centres[labels] + random.standard_normal((90, 6))).astype(np.float32), labels)


def test_a_learner_on_features_learns_and_leaves_what_is_frozen() -> None:
    learner = FeatureLearner(SPEC, clusters(0), steps=60, batch_size=16, learning_rate=0.05, seed=3)
    start = features.drawn_adapter(SPEC, 0)
    fitted = learner.fit(start, FitJob(1, 0, ("hidden.A",), position=0))
    assert features.accuracy(start.tensors, clusters(1))["accuracy"] < 0.7
    assert features.accuracy(fitted.after, clusters(1))["accuracy"] > 0.9
    np.testing.assert_array_equal(fitted.after["hidden.A"], start.tensors["hidden.A"])
    assert np.abs(fitted.after["hidden.B"]).max() > 0
    np.testing.assert_array_equal(fitted.before["head.weight"], start.tensors["head.weight"])
    assert (fitted.examples, fitted.position) == (960, 60)
    assert learner.evaluate(AdapterState(SPEC, fitted.after))["rows"] == 90


@pytest.fixture(scope="module")
def federation(tiny_model: Path, tiny_rows: Path) -> RunConfig:
    return tiny.run_config(
        tiny_model,
        tiny_rows,
        Path("nowhere"),
        rounds=6,
        federation={"clients": 8, "cohort": 8},
        data={"test_fraction": 0.3},
        training={"steps": 10, "batch_size": 8, "learning_rate": 0.02},
        evaluation={"every": 0},
    )


@pytest.fixture(scope="module")
def bench() -> FrozenFeatures:
    return FrozenFeatures(rank=2)


def run(config: RunConfig, bench: FrozenFeatures, attack: str, rule: str, attackers: int = 2) -> Outcome:
    return outcome_of(Cell("iid", attackers, attack, rule, 5), config, bench)


def test_poisoned_rows_are_what_their_kind_says(federation: RunConfig) -> None:
    rows = deal_rows(federation).sites[0]
    following = {"maybe": "no", "no": "yes", "yes": "maybe"}
    assert [row.label for row in poisoned("flipped", rows, federation)] == [following[row.label] for row in rows]
    assert poisoned("", rows, federation) == list(rows)
    made = poisoned("triggered", rows, federation)
    assert made[: len(rows)] == list(rows)
    assert all(row.text.startswith(TRIGGER) and row.label == "yes" for row in made[len(rows) :])
    doors = backdoored(deal_rows(federation), federation)
    assert doors
    assert target_of(federation) not in {row.label for row in doors}


def test_a_mean_falls_to_attackers_that_a_robust_rule_turns_away(federation: RunConfig, bench: FrozenFeatures) -> None:
    calm, mean, chosen = (
        run(federation, bench, *case)
        for case in (("none", "fedavg"), ("sign_flip", "fedavg"), ("sign_flip", "multi_krum"))
    )
    rows = calm.answers.rows
    assert rows == len(deal_rows(federation).test)
    assert mean.answers.hits < calm.answers.hits - 0.15 * rows
    assert chosen.answers.hits > mean.answers.hits
    assert mean.judged is None
    assert chosen.judged is not None
    assert np.mean(chosen.judged.weights) == 0
    assert chosen.judged.honest.total() == 6 * 6
    assert chosen.judged.rejected.total() == 0


def test_half_the_clients_are_more_than_a_rule_can_withstand(federation: RunConfig, bench: FrozenFeatures) -> None:
    few, many = (run(federation, bench, "ipm", "multi_krum", attackers) for attackers in (2, 4))
    assert many.answers.hits < few.answers.hits
    assert many.judged is not None
    assert np.mean(many.judged.weights) > 0.5


def test_a_gauge_moves_a_mean_of_factors_and_no_rule_that_looks_at_products(
    federation: RunConfig, bench: FrozenFeatures
) -> None:
    answers = {
        (attack, rule): run(federation, bench, attack, rule).answers
        for attack in ("none", "gauge_inflation")
        for rule in ("fedavg", "norm_bound")
    }
    assert answers["none", "norm_bound"] == answers["gauge_inflation", "norm_bound"]
    assert answers["none", "fedavg"] != answers["gauge_inflation", "fedavg"]


@pytest.mark.parametrize("rule", ["krum", "multi_krum", "bulyan", "geometric_median", "norm_bound"])
def test_as_many_updates_have_a_share_as_the_journal_says_were_used(rule: str, federation: RunConfig) -> None:
    told = (*poisoning.RULES[rule], "federation.clients=11", "federation.cohort=11", "federation.quorum=11")
    config = override(federation, (f"aggregation.merge.rule={rule}", *told, "rounds=1", "training.steps=1"))
    used: list[int] = []

    def heard(state: ServerState, updates: Mapping[int, Update]) -> None:
        shares = poisoning.shares_of(config, state, updates)
        assert shares is not None
        used.append(int(np.count_nonzero(shares)))

    def wrap(inner: Transport, state: Callable[[], ServerState]) -> Transport:
        return hostile(inner, strategy_of(config), {1, 2}, ATTACKS["sign_flip"].forge, state, heard)

    rounds = [one for one in record(config, wrap=wrap).journal if one["event"] == "round"]
    assert used == [one["updates_used"] for one in rounds]
    assert len(used) == 1


def test_hostile_clients_can_be_set_on_a_real_model(federation: RunConfig) -> None:
    config, calls = override(federation, ("rounds=2", "training.learning_rate=0.03")), []
    calm, taken = (
        on_models(config, {1, 2, 3}, ATTACKS[name], lambda state, updates: calls.append(len(updates)))
        for name in ("none", "replacement")
    )
    assert calls == [8] * 4
    assert (calm.rows, calm.triggered) == (taken.rows, taken.triggered)
    assert calm.triggered == len(backdoored(deal_rows(config), config))
    assert taken != calm


@pytest.mark.parametrize("rule", poisoning.RULES)
def test_every_rule_runs_with_what_its_runs_are_told(rule: str, federation: RunConfig, bench: FrozenFeatures) -> None:
    short = override(federation, ["rounds=1", "federation.clients=11", "federation.cohort=11"])
    found = run(short, bench, "alie", rule)
    assert found.answers.rows > 0
    assert (found.judged is not None) == (rule not in ("fedavg", "median", "trimmed_mean"))


def test_attackers_are_as_many_as_asked_and_others_under_another_seed(federation: RunConfig) -> None:
    drawn = {poisoning.attackers_of(override(federation, [f"seed={seed}"]), 3) for seed in range(5)}
    assert {len(one) for one in drawn} == {3}
    assert len(drawn) > 1


def test_tables_and_findings_tell_what_an_attack_took_away() -> None:
    calm, cell = Cell("iid", 2, "none", "krum", 1), Cell("iid", 2, "sign_flip", "krum", 1)
    outcomes = {
        calm: Outcome(Answers(80, 100, 5, 50), Judged([0.2], {0: 1}, {})),  # type: ignore[arg-type]
        cell: Outcome(
            Answers(60, 100, 25, 50),
            Judged([0.5, 0.7], *(poisoning.Counter(count) for count in ({0: 2, 3: 2}, {3: 2}))),
        ),
    }
    found = {one.metric: one.value for one in poisoning.findings_of(cell, outcomes)}
    assert found["accuracy"] == 0.6
    assert found["accuracy lost to the attack"] == pytest.approx(0.2)
    assert found["triggered rows taken for the target's"] == 0.5
    assert found["weight of the attackers"] == pytest.approx(0.6)
    assert found["honest updates turned away"] == 0.5
    assert found["turned away of one honest client"] == 1.0
    outcomes[calm] = outcomes[calm]._replace(judged=None)
    text = "\n".join(tables(outcomes))
    assert "### 2 attackers, sites by iid" in text
    assert "| sign_flip | 60.0 |" in text
    assert "| none | – |" in text


def test_the_command_writes_tables_and_findings(tiny_run: str, tmp_path: Path) -> None:
    settings, out = tmp_path / "run.toml", tmp_path / "out"
    settings.write_text(tiny_run.replace("clients = 3, cohort = 2", "clients = 8, cohort = 8"))
    program = typer.Typer()
    program.command()(poisoning.main)
    asked = ["--attacks", "sign_flip", "--rules", "fedavg,krum", "--set", "data.partition.least_rows=1"]
    done = CliRunner().invoke(program, [str(settings), "--out", str(out), *asked, "--set", "rounds=1"])
    assert done.exit_code == 0, done.output
    assert "### 6 attackers, sites by iid" in (out / "table.md").read_text()
    records = journal.read(out / "findings.jsonl")
    assert {record["rule"] for record in records} == {"fedavg", "krum"}
    assert {record["attack"] for record in records} == {"poisoning, none", "poisoning, sign_flip"}
    assert len(findings.read(out / "findings.jsonl")) == len(records)


def test_the_report_of_a_run_tells_of_hostile_clients_against_its_own_rule_alone(tiny_run: str, tmp_path: Path) -> None:
    settings, root = tmp_path / "run.toml", tmp_path / "run"
    settings.write_text(tiny_run.replace("clients = 3, cohort = 2", "clients = 8, cohort = 8"))
    shared = override(load(settings), ["rounds=1", "data.partition.least_rows=1", f"out={root}"])
    config = poisoning.config_of(Cell("iid", 2, "none", "krum", 7), shared)
    folder = RunFolder(root)
    create(folder, config)
    journal.append(folder.journal, {"event": "start", "config": to_flat(config)})
    program = typer.Typer()
    program.command()(poisoning.main)
    asked = [str(settings), "--attacks", "sign_flip", "--set", "rounds=1", "--set", "data.partition.least_rows=1"]
    places = ["--out", str(tmp_path / "out"), "--report", str(root)]
    failed = CliRunner().invoke(program, [*asked, *places, "--rules", "fedavg"])
    assert "found another aggregation.merge" in str(failed.exception)
    assert not (tmp_path / "out").exists()
    done = CliRunner().invoke(program, [*asked, *places, "--rules", "fedavg,krum", "--seeds", "7,8"])
    assert done.exit_code == 0, done.output
    told = [record for record in journal.read(folder.journal) if record["event"] == "finding"]
    assert {(one["rule"], one["skew"]) for one in told} == {("krum", "iid")}
    assert {one["seed"] for one in told} == {7, 8}
    assert {one["attack"] for one in told} == {"poisoning, none", "poisoning, sign_flip"}
    assert "poisoning, sign_flip" in (root / "report.html").read_text()


def test_the_attack_command_writes_what_it_found(
    tiny_config: Callable[..., RunConfig], tiny_run: str, tmp_path: Path
) -> None:
    from simulations.privacy import attack

    settings, out = tmp_path / "run.toml", tmp_path / "found.jsonl"
    settings.write_text(tiny_run)
    program = typer.Typer()
    program.command()(attack.main)
    runner = CliRunner()
    asked = ["inversion", str(settings), "--set", "rounds=2", "--seeds", "5,6", "--out", str(out)]
    done = runner.invoke(program, [*asked, "--attack", "most=2"])
    assert done.exit_code == 0, done.output
    assert "| inversion |" in done.output
    records = journal.read(out)
    assert [record["seed"] for record in records] == [5] * 4 + [6] * 4
    assert json.loads(json.dumps(records[0]))["settings"]["most"] == 2
    failed = runner.invoke(program, [*asked, "--attack", "mots=2"])
    assert "did you mean most" in str(failed.exception)
    assert "expected one of inversion" in str(runner.invoke(program, ["guess", str(settings)]).exception)
