"""Every task over a federation in this process: it gets better at it, and twice the same run is the same to the bit."""

from __future__ import annotations

import html
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fedpeft.config import RunConfig
from fedpeft.config.training import METRICS
from fedpeft.data.fields import Row
from fedpeft.engines.local import LocalTransport
from fedpeft.errors import DataError, PlanError
from fedpeft.experiment import adapted_model, deal_rows, evaluator_of, plan_of, resolve, samples_of, site_of, task_of
from fedpeft.federate import federate
from fedpeft.memory import FolderMemory
from fedpeft.runs import folder_for
from fedpeft.tasks import Task
from tests import tiny

pytestmark = pytest.mark.usefixtures("one_thread")

# The base's fixture, that of the rows, and the task's settings.
TASKS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "sequence_classification": ("tiny_model", "tiny_rows", {"max_tokens": 16}),
    "token_classification": ("tiny_model", "tiny_tags", {"max_tokens": 16}),
    "causal_lm": ("tiny_llama", "tiny_answers", {"max_tokens": 16, "packing": True}),
    "seq2seq": ("tiny_t5", "tiny_targets", {"max_tokens": 16, "exact_match": True}),
}
every_task = pytest.mark.parametrize("kind", sorted(TASKS))


def made(kind: str, out: Path, request: pytest.FixtureRequest, **changes: Any) -> RunConfig:
    base, rows, settings = TASKS[kind]
    given = {
        "rounds": 3,
        "task": {"kind": kind, kind: settings},
        "training": {"steps": 4, "batch_size": 8, "learning_rate": 0.05},
        "adapter": {"family": "lora", "lora": {"rank": 3, "alpha": 6.0}},
    }
    return tiny.run_config(request.getfixturevalue(base), request.getfixturevalue(rows), out, **{**given, **changes})


def run(config: RunConfig) -> list[dict[str, Any]]:
    folder = folder_for(config)
    return federate(config, folder, tiny.transport(config, folder), engine="local")


@every_task
def test_a_federation_gets_better_at_its_task_and_does_so_twice(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    config = made(kind, tmp_path / "one", request)
    before = evaluator_of(config)(adapted_model(config).initial)
    records = run(config)
    after, metric = records[-1]["evaluation"], config.evaluation.metric
    assert metric == config.task.chosen.metrics[0]
    assert {*config.task.chosen.metrics, "rows", "groups"} == set(after)
    assert METRICS[metric] * after[metric] > METRICS[metric] * before[metric]
    assert after["loss"] < before["loss"]
    assert {name: one["rows"] for name, one in after["groups"].items()} == {"films": 6, "shops": 6} or after[
        "rows"
    ] > 12
    run(made(kind, tmp_path / "other", request))
    adapters = [(tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in ("one", "other")]
    assert adapters[0] == adapters[1]


@every_task
def test_a_metric_that_the_task_does_not_measure_is_refused_before_the_run(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    with pytest.raises(
        PlanError, match=rf"evaluation\.metric: expected one of .*, which {kind} measures, found margin"
    ):
        made(kind, tmp_path, request, evaluation={"metric": "margin"})
    config = made(kind, tmp_path, request, evaluation={"metric": "loss"})
    assert (plan_of(config, "r", "s").metric, plan_of(config, "r", "s").metric_sign) == ("loss", -1)
    assert resolve(config) == config


@pytest.mark.parametrize("rule", ["dirichlet", "label"])
def test_a_partition_by_label_is_refused_where_there_is_none(
    rule: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    origin = {"source": "jsonl", "jsonl": {"path": str(request.getfixturevalue("tiny_answers"))}}
    config = made("causal_lm", tmp_path, request, data={"origin": origin, "partition": {"by": rule}})
    with pytest.raises(DataError, match=r"data\.partition\.by: expected rows with a label, found a task without"):
        deal_rows(config)


def test_rows_of_another_task_name_the_column_that_they_lack(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    columns = {"jsonl": {"path": str(request.getfixturevalue("tiny_answers")), "columns": {"target": "anwser"}}}
    with pytest.raises(
        DataError, match=r"rows\.jsonl:1: expected a column 'anwser', .* nearest 'answer'; set columns\.target"
    ):
        made("seq2seq", tmp_path, request, data={"origin": {"source": "jsonl", **columns}})


@every_task
def test_held_out_rows_are_answered_in_words_where_the_task_has_any(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    config = made(kind, tmp_path, request)
    found = samples_of(config, adapted_model(config).initial, 2)
    assert len(found) == (2 if "classification" not in kind else 0)
    rows = [(row.text, row.fields.get("answer", row.fields.get("target"))) for row in deal_rows(config).test]
    for one, (text, wanted) in zip(found, rows, strict=False):
        assert one.given.split()[0] == text.split()[0]
        assert one.expected == wanted


def own_task(config: RunConfig) -> Task:
    """The run's task on texts without their last word, with a loss twice as large."""
    given = task_of(config)

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        return 2 * given.loss(model, batch)

    def encode(rows: Any, tokenizer: Any, place: str) -> Any:
        return given.encode([replace(row, text=row.text.rsplit(" ", 1)[0]) for row in rows], tokenizer, place)

    return given._replace(loss=loss, encode=encode)


def test_a_site_may_train_on_a_task_of_its_own(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    config = made("sequence_classification", tmp_path / "run", request)
    folder = folder_for(config)

    def site(partition: int) -> Any:
        return site_of(config, partition, own_task=own_task if partition == 0 else None)

    plain, special = (site_of(config, 0, own_task=own) for own in (None, own_task))
    pairs = list(zip(plain.learner.examples, special.learner.examples, strict=True))  # type: ignore[attr-defined]
    assert all(other.tokens == (*one.tokens[:-2], one.tokens[-1]) for one, other in pairs)
    batch = task_of(config).collate([one for one, _ in pairs[:4]], 0, torch.device("cpu"))
    losses = [one.learner.task.loss(adapted_model(config).model.eval(), batch) for one in (plain, special)]  # type: ignore[attr-defined]
    assert losses[1].detach() == 2 * losses[0].detach()
    before = evaluator_of(config)(adapted_model(config).initial)
    transport = LocalTransport(config.federation.clients, site, FolderMemory(folder.memories))
    records = federate(config, folder, transport, engine="local")
    assert [record["failures"] for record in records if record["event"] == "round"] == [[]] * 3
    assert 0 in {client["partition"] for record in records[1:-1] for client in record["clients"]}
    assert records[-1]["evaluation"]["accuracy"] > before["accuracy"]


def test_a_site_with_no_rows_or_a_bad_one_is_named(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    config = made("causal_lm", tmp_path, request)
    with pytest.raises(DataError, match="partition 2: expected at least one row, found none"):
        site_of(config, 2, lambda config: [])
    with pytest.raises(DataError, match="partition 2, row 2: expected a text and an answer, found no answer"):
        site_of(config, 2, lambda config: [Row("so", fields={"answer": "yes"}), Row("so")])
    config = made("sequence_classification", tmp_path, request)
    with pytest.raises(DataError, match=r"partition 1, row 1: .* labels maybe, no, yes, found 'perhaps'"):
        site_of(config, 1, lambda config: [Row("so", "perhaps")])


def test_the_report_shows_what_the_model_answers(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    config = made("causal_lm", tmp_path / "run", request)
    folder = folder_for(config)
    transport = LocalTransport(
        config.federation.clients, lambda partition: site_of(config, partition), FolderMemory(folder.memories)
    )
    end = federate(config, folder, transport, engine="local")[-1]
    assert [sorted(sample) for sample in end["samples"]] == [["answered", "expected", "given"]] * 3
    page = (folder.root / "report.html").read_text()
    assert "What it answers" in page
    assert all(html.escape(sample["expected"]) in page for sample in end["samples"])
