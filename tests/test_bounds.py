from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from fedpeft import experiment, journal
from fedpeft.adapters import AdapterState
from fedpeft.bounds import BOUNDS, measure_bounds
from fedpeft.client import FitJob
from fedpeft.experiment import adapted_model, evaluator_of, learner_of, site_examples
from fedpeft.federate import federate
from fedpeft.models import extract
from fedpeft.runs import folder_for
from tests import tiny

pytestmark = pytest.mark.usefixtures("one_thread")


def test_bounds_are_measured_on_the_same_held_out_rows_and_journaled(
    tiny_model: Path, tiny_rows: Path, tmp_path: Path
) -> None:
    config = tiny.run_config(tiny_model, tiny_rows, tmp_path / "run", rounds=2)
    folder = folder_for(config)
    records = federate(config, folder, tiny.transport(config, folder), engine="local", bounds=BOUNDS)
    assert [record["event"] for record in records] == ["start", "round", "round", "bounds", "end"]
    rows = records[-2]["rows"]
    assert [row["name"] for row in rows] == [bound.name for bound in BOUNDS]
    for row in rows:
        assert row["evaluation"]["rows"] == len(experiment.test_examples(config)) == records[-1]["evaluation"]["rows"]
        assert set(row["evaluation"]["groups"]) == {"films", "shops"}
        assert 0 <= row["evaluation"]["accuracy"] <= 1
        assert row["seconds"] > 0
    assert rows[1]["spread"] >= 0
    assert journal.read(folder.journal)[-2]["rows"] == rows
    assert (folder.root / "report.html").stat().st_size > 1000


def test_bounds_come_out_the_same_again_and_differ_from_each_other(
    tiny_model: Path, tiny_rows: Path, tmp_path: Path
) -> None:
    config = tiny.run_config(tiny_model, tiny_rows, tmp_path / "run", rounds=2)
    told: list[str] = []
    first, second = (measure_bounds(config, BOUNDS, told.append) for _ in range(2))
    assert [row["evaluation"] for row in first] == [row["evaluation"] for row in second]
    assert len({row["evaluation"]["loss"] for row in first}) == 3
    assert told == [bound.name for bound in BOUNDS] * 2


def test_sites_alone_is_the_mean_over_sites(tiny_model: Path, tiny_rows: Path, tmp_path: Path) -> None:
    config = tiny.run_config(tiny_model, tiny_rows, tmp_path / "run", federation={"clients": 2, "cohort": 2})
    found = BOUNDS[1].measure(config)
    # Four rounds of two steps for each of both sites, as one schedule.
    alone = replace(config, rounds=1, training=replace(config.training, steps=8))
    scores = []
    for site in (0, 1):
        adapted = adapted_model(config)
        fitted = learner_of(alone, site_examples(config, site)).fit(adapted.initial, FitJob(1, site, (), 0))
        scores.append(evaluator_of(config)(AdapterState(adapted.spec, fitted.after)))
    for key in ("accuracy", "loss", "macro_f1"):
        assert found["evaluation"][key] == pytest.approx(sum(score[key] for score in scores) / 2)
    for group in ("films", "shops"):
        expected = sum(score["groups"][group]["accuracy"] for score in scores) / 2
        assert found["evaluation"]["groups"][group]["accuracy"] == pytest.approx(expected)
    assert found["spread"] == pytest.approx(abs(scores[0]["accuracy"] - scores[1]["accuracy"]) / 2)


def test_a_bound_leaves_the_shared_model_able_to_go_on(tiny_model: Path, tiny_rows: Path, tmp_path: Path) -> None:
    config = tiny.run_config(tiny_model, tiny_rows, tmp_path / "run", rounds=1)
    adapted = adapted_model(config)
    before = adapted.initial.tensors["classifier.weight"].copy()
    measure_bounds(config, BOUNDS, lambda name: None)
    assert adapted_model(config) is adapted
    assert (adapted.initial.tensors["classifier.weight"] == before).all()
    assert extract(adapted).spec == adapted.spec


def test_no_bounds_measures_nothing(tiny_model: Path, tiny_rows: Path, tmp_path: Path) -> None:
    config = tiny.run_config(tiny_model, tiny_rows, tmp_path / "run")
    assert measure_bounds(config, (), lambda name: None) == []


def test_where_a_task_has_no_head_the_frozen_model_is_the_base_alone(
    tiny_llama: Path, tiny_answers: Path, tmp_path: Path
) -> None:
    task = {"kind": "causal_lm", "causal_lm": {"max_tokens": 16}}
    for family in ("lora", "prompt_tuning"):
        config = tiny.run_config(tiny_llama, tiny_answers, tmp_path / "run", task=task, adapter={"family": family})
        frozen, alone, pooled = measure_bounds(config, BOUNDS, lambda name: None)
        assert frozen["name"] == "frozen model"
        lora = tiny.run_config(tiny_llama, tiny_answers, tmp_path / "run", task=task, adapter={"family": "lora"})
        untrained = evaluator_of(lora)(adapted_model(lora).initial)
        assert frozen["evaluation"]["perplexity"] == pytest.approx(untrained["perplexity"], rel=1e-5)
        assert alone["spread"] > 0
        assert pooled["evaluation"]["perplexity"] < frozen["evaluation"]["perplexity"]
