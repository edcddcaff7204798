"""Whole runs under differential privacy: what is drawn, spent, stopped, resumed and said."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import dp_accounting as dp
import pytest
from dp_accounting import pld

from fedpeft import federate as running
from fedpeft import journal
from fedpeft.commands.check import protection
from fedpeft.config import RunConfig, override
from fedpeft.errors import ConfigError, DataError, PlanError
from fedpeft.experiment import deal_rows, resolve, spent_of
from fedpeft.federate import federate, silent
from fedpeft.privacy import epsilon, ledger
from fedpeft.report.history import history
from fedpeft.report.protection import protection_words
from fedpeft.runs import RunFolder, folder_for, reopen
from fedpeft.updates import Spent
from tests import tiny
from tests.tiny import transport

pytestmark = pytest.mark.usefixtures("one_thread")

CENTRAL = (
    "privacy.mechanism=central",
    "privacy.central.noise_multiplier=0.8",
    "privacy.central.clip_norm=0.5",
    "privacy.central.entropy=seed",
    "aggregation.merge.rule=ffa_lora",
    "aggregation.merge.ffa_lora.weights=uniform",
    "federation.clients=4",
)


class Killed(BaseException):
    """Stands for a kill: nothing in the run catches it."""


@pytest.fixture
def plan(tiny_model: Path, tiny_rows: Path, tmp_path: Path) -> Callable[..., RunConfig]:
    def made(out: str, *overrides: str) -> RunConfig:
        return override(tiny.run_config(tiny_model, tiny_rows, tmp_path / out), [*CENTRAL, *overrides])

    return made


def run(config: RunConfig, **more: Any) -> list[dict[str, Any]]:
    settled = resolve(config)
    folder = folder_for(settled)
    return federate(settled, folder, transport(settled, folder), engine="local", **more)


def resumed(root: Path) -> list[dict[str, Any]]:
    folder, config = reopen(root, [])
    return federate(config, folder, transport(config, folder), engine="local", resume=True)


def rounds_of(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [record for record in records if record["event"] == "round"]


def weights(root: Path) -> bytes:
    return (root / "adapter" / "adapter_model.safetensors").read_bytes()


def test_each_round_pays_before_it_releases_and_the_journal_says_what_it_comes_to(
    plan: Callable[..., RunConfig], tmp_path: Path
) -> None:
    records = rounds_of(run(plan("run")))
    paid = ledger.paid(RunFolder(tmp_path / "run").ledger, ())
    assert [spent.round for spent in paid] == [1, 2, 3, 4]
    assert {(spent.sampler, spent.clients, spent.rate, spent.noise_multiplier) for spent in paid} == {
        ("poisson", 4, 0.5, 0.8)
    }
    spent = [record["epsilon"] for record in records]
    assert spent == sorted(spent)
    assert spent[-1] == spent_of(resolve(plan("run")), paid)
    assert {record["clip_norm"] for record in records} == {0.5}


def test_the_server_stops_before_its_budget_is_exceeded(plan: Callable[..., RunConfig]) -> None:
    whole = run(plan("whole"))
    second = rounds_of(whole)[1]["epsilon"]
    stopped = run(plan("short", f"privacy.central.epsilon={second * 1.001}"))
    assert [record["round"] for record in rounds_of(stopped)] == [1, 2]
    assert stopped[-1]["stopped"] == "budget"


def test_noise_is_found_for_a_promise(plan: Callable[..., RunConfig]) -> None:
    asked = resolve(plan("run", "privacy.central.noise_multiplier=0", "privacy.central.epsilon=3"))
    spent = asked.privacy.chosen.build(tiny_population(asked)).charge(1)
    assert 2.9 < spent_of(asked, (spent,) * asked.rounds) <= 3.0


def tiny_population(config: RunConfig) -> Any:
    from fedpeft.experiment import population_of

    return population_of(config)


@pytest.mark.parametrize("more", [(), ("privacy.central.adaptive=true",), ("privacy.central.bands=2",)])
def test_a_run_that_is_killed_and_taken_up_ends_with_the_same_bytes(
    plan: Callable[..., RunConfig], tmp_path: Path, more: tuple[str, ...]
) -> None:
    run(plan("whole", *more))

    def done(record: dict[str, Any]) -> None:
        if record["round"] == 2:
            raise Killed

    with pytest.raises(Killed):
        run(plan("cut", *more), watcher=replace(silent(), round=done))
    resumed(tmp_path / "cut")
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")


def test_a_run_that_dies_between_paying_and_releasing_pays_for_the_round_again(
    plan: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pay = ledger.pay

    def paying(path: Path, spent: Spent) -> None:
        pay(path, spent)
        if spent.round == 2:
            raise Killed

    monkeypatch.setattr(running.ledger, "pay", paying)
    with pytest.raises(Killed):
        run(plan("cut"))
    monkeypatch.undo()
    assert [record["round"] for record in rounds_of(journal.read(tmp_path / "cut" / "journal.jsonl"))] == [1]
    records = rounds_of(resumed(tmp_path / "cut"))
    paid = ledger.paid(RunFolder(tmp_path / "cut").ledger, ())
    assert [spent.round for spent in paid] == [1, 2, 2, 3, 4]
    assert records[-1]["epsilon"] == spent_of(resolve(plan("run")), paid)
    assert records[-1]["epsilon"] > spent_of(resolve(plan("run")), paid[:4])
    run(plan("whole"))
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")


def test_rounds_to_which_nobody_is_drawn_are_rounds_of_noise(plan: Callable[..., RunConfig]) -> None:
    records = rounds_of(run(plan("rare", "federation.clients=12", "federation.cohort=1", "rounds=8", "seed=3")))
    empty = [record for record in records if not record["clients"]]
    assert empty, "no round of this seed is empty: choose another"
    assert all(record["cohort"] == [] and record["update_norm"] > 0 and record["loss"] is None for record in empty)
    assert len(records) == 8


def test_clients_that_protect_themselves_go_with_any_rule(plan: Callable[..., RunConfig], tmp_path: Path) -> None:
    local = ("privacy.mechanism=local", "privacy.local.noise_multiplier=2", "privacy.local.clip_norm=0.1")
    records = run(plan("local", *local, "aggregation.merge.rule=fedex"))
    assert all(record["epsilon"] > 0 for record in rounds_of(records))
    noise = [client["update_norm"] for record in rounds_of(records) for client in record["clients"]]
    size = history(records).start["adapter"]["trainable_parameters"] ** 0.5
    assert all(0.5 * 0.2 * size < found < 2 * 0.2 * size for found in noise)


def test_a_run_stops_before_a_client_that_trained_in_each_round_would_exceed_its_budget(
    plan: Callable[..., RunConfig], tmp_path: Path
) -> None:
    local = ("privacy.mechanism=local", "privacy.local.noise_multiplier=2", "privacy.local.delta=1e-5")
    own = Spent(0, "own", 1, 1.0, 2.0)
    budget = epsilon((own, own), 1e-5) * 1.001
    config = plan("local", *local, f"privacy.local.epsilon={budget}", "federation.cohort=2")
    told = dict(protection(resolve(config)))
    assert told["privacy after all rounds"].endswith("at δ = 1e-05 for a client that trains in each")
    assert told["budget"] == f"stops before a round that would exceed ε = {budget:g}"
    records = run(config)
    assert [record["round"] for record in rounds_of(records)] == [1, 2]
    assert records[-1]["stopped"] == "budget"
    assert len(ledger.paid(RunFolder(tmp_path / "local").ledger, ())) == 2


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("privacy.central.delta=0.3",), "privacy.central.delta: expected at most 1/4, .* found 0.3"),
        (("privacy.central.noise_multiplier=0",), "expected epsilon or noise_multiplier above 0, found neither"),
        (
            ("privacy.central.adaptive=true", "privacy.central.count_noise=0.2"),
            "privacy.central.count_noise: expected above 0.4",
        ),
    ],
)
def test_a_promise_that_means_nothing_is_refused(
    plan: Callable[..., RunConfig], overrides: tuple[str, ...], words: str
) -> None:
    with pytest.raises(PlanError, match=words):
        resolve(plan("run", *overrides))


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("privacy.central.clip_norm=0", "with 0 nothing is left of any update"),
        ("privacy.central.sampler=coins", "one of poisson, fixed, everyone, reachable"),
        ("privacy.central.entropy=time", "one of os, seed"),
        ("privacy.central.bands=0", "at least 1"),
        ("privacy.central.quantile=1", "between 0 and 1"),
    ],
)
def test_a_setting_out_of_range_is_refused(plan: Callable[..., RunConfig], setting: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        plan("run", setting)


def test_bands_go_with_coins_and_one_scale(plan: Callable[..., RunConfig]) -> None:
    for other in ("privacy.central.sampler=fixed", "privacy.central.adaptive=true"):
        with pytest.raises(ConfigError):
            plan("run", "privacy.central.bands=3", other)


def test_the_report_says_what_was_protected_from_whom_and_what_was_not(
    plan: Callable[..., RunConfig], tmp_path: Path
) -> None:
    records = run(plan("run"))
    said = " ".join(protection_words(history(records)))
    spent = rounds_of(records)[-1]["epsilon"]
    for words in (
        "the unit is a client",
        "Not from the server",
        f"ε = {spent:.3g} at δ = 0.22",
        "each client was drawn by a coin of its own",
        "clipped to a norm of 0.5",
        "noise of 0.8 times that",
        "Not protected: what each client says",
        "protects nobody: noise and draws came from the run's seed",
    ):
        assert words in said, words
    page = (tmp_path / "run" / "report.html").read_text()
    assert "What was protected, and what was not" in page
    open_ = " ".join(protection_words(history([json.loads(json.dumps(records[0])) | {"config": {}}])))
    assert "Nothing else was protected" in open_


EXAMPLE = ("privacy.mechanism=example", "privacy.example.entropy=seed", "privacy.example.noise_multiplier=1.5")


def test_examples_are_protected_for_the_smallest_site_and_the_account_counts_its_steps(
    plan: Callable[..., RunConfig],
) -> None:
    config = resolve(plan("run", *EXAMPLE))
    smallest = min(map(len, deal_rows(config).sites))
    assert config.privacy.chosen.rows == smallest
    records = rounds_of(run(plan("run", *EXAMPLE)))
    steps, batch = config.training.steps, config.training.batch_size
    rate = min(1.0, batch / smallest)
    direct = pld.PLDAccountant(dp.NeighboringRelation.ADD_OR_REMOVE_ONE)
    direct.compose(dp.PoissonSampledDpEvent(rate, dp.GaussianDpEvent(1.5)), steps * config.rounds)
    assert records[-1]["epsilon"] == pytest.approx(direct.get_epsilon(smallest**-1.1))
    assert all("clipped_examples" in client for record in records for client in record["clients"])


def test_a_site_with_fewer_rows_than_the_promise_was_made_for_takes_no_part(plan: Callable[..., RunConfig]) -> None:
    config = plan("run", *EXAMPLE, "privacy.example.rows=1000")
    with pytest.raises(DataError, match=r"expected at least 1000, for which privacy\.example makes its promise"):
        run(config)
