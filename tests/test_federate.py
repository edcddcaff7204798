from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.numpy import load_file

from fedpeft import checkpoint, experiment, journal
from fedpeft.config import RunConfig
from fedpeft.errors import AdapterError, CheckpointError, PlanError, QuorumError, RunFolderError
from fedpeft.evaluation import evaluate
from fedpeft.experiment import adapted_model, release_models, task_of
from fedpeft.federate import Watcher, federate, silent
from fedpeft.locks import held
from fedpeft.models import install
from fedpeft.runs import folder_for, reopen
from fedpeft.stages import layers_of
from tests import tiny
from tests.tiny import FAMILIES, logits, transport

pytestmark = pytest.mark.usefixtures("one_thread")
families = pytest.mark.parametrize("family", sorted(FAMILIES))


class Killed(BaseException):
    """Stands for a kill: nothing in the run catches it."""


@pytest.fixture
def config(tiny_model: Path, tiny_rows: Path, tmp_path: Path) -> Callable[..., RunConfig]:
    def made(out: str = "run", **changes: Any) -> RunConfig:
        return tiny.run_config(tiny_model, tiny_rows, tmp_path / out, **changes)

    return made


def begin(config: RunConfig, **more: Any) -> list[dict[str, Any]]:
    folder = folder_for(config)
    return federate(config, folder, transport(config, folder), engine="local", **more)


def resume(root: Path, *overrides: str, **more: Any) -> list[dict[str, Any]]:
    folder, config = reopen(root, list(overrides))
    return federate(config, folder, transport(config, folder), engine="local", resume=True, **more)


def weights(root: Path) -> dict[str, bytes]:
    """The deployed adapter's tensors as bytes."""
    name = "adapter_model.safetensors" if (root / "adapter" / "adapter_config.json").exists() else "model.safetensors"
    return {key: value.tobytes() for key, value in load_file(root / "adapter" / name).items()}


def timeless(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rounds and the end of a journal less what a clock says."""
    kept = [record for record in records if record["event"] in {"round", "end"}]
    return [_without(record) for record in json.loads(json.dumps(kept))]


def _without(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without(item) for key, item in value.items() if key not in ("seconds", "time")}
    return [_without(item) for item in value] if isinstance(value, list) else value


def cut_at(round_: int, replies: int = 0) -> Watcher:
    """A watcher that kills the run once round `round_` is settled, or in it after so many replies."""

    def reply(number: int, partition: int, usable: bool) -> None:
        nonlocal replies
        if number == round_ and replies:
            replies -= 1
            if replies == 0:
                raise Killed

    def done(record: dict[str, Any]) -> None:
        if record["round"] == round_ and replies == 0:
            raise Killed

    return replace(silent(), reply=reply, round=done)


def begun(config: RunConfig, watcher: Watcher) -> Path:
    """The folder of a run that was killed when `watcher` said so."""
    with pytest.raises(Killed):
        begin(config, watcher=watcher)
    return Path(config.out)


def gone_on(root: Path, watcher: Watcher) -> None:
    with pytest.raises(Killed):
        resume(root, watcher=watcher)


def state(root: Path) -> dict[str, Any]:
    """Everything in the newest checkpoint but the run's own name."""
    found = checkpoint.load(root / "checkpoint")
    parts = {
        "adapter": found.adapter.tensors,
        "residual": found.adapter.residual,
        "control": found.control,
        "optimizer": found.optimizer,
    }
    tensors = {part: {key: value.tobytes() for key, value in held.items()} for part, held in parts.items()}
    plain = {"round": found.round, "seed": found.seed, "progress": found.progress}
    return {**tensors, **plain, "drift": found.drift, "holdings": found.holdings}


def test_a_run_leaves_everything_in_its_folder(config: Callable[..., RunConfig]) -> None:
    made = config()
    records = begin(made)
    root = Path(made.out)
    assert sorted(path.name for path in root.iterdir()) == [
        "adapter",
        "checkpoint",
        "config.toml",
        "journal.jsonl",
        "memories",
        "report.html",
    ]
    assert [record["event"] for record in records] == ["start", *["round"] * 4, "end"]
    start, *rounds, end = records
    assert start["labels"] == ["maybe", "no", "yes"]
    assert start["adapter"]["bytes"] == 4 * start["adapter"]["trainable_parameters"]
    assert sum(partition["rows"] for partition in start["partitions"]) == start["data"]["train_rows"]
    assert [record["round"] for record in rounds] == [1, 2, 3, 4]
    assert all(len(record["cohort"]) == 2 for record in rounds)
    assert end["bytes_up"] == sum(record["bytes_up"] for record in rounds)
    assert end["full_model_bytes"] == 4 * (2 + 2) * start["adapter"]["base_bytes"]
    assert end["evaluation"] == rounds[-1]["evaluation"]
    assert set(end["evaluation"]["groups"]) == {"films", "shops"}
    assert (end["rounds"], end["stopped"]) == (4, "completed")
    assert checkpoint.load(root / "checkpoint").round == 4
    assert reopen(root, [])[1] == made


def test_a_round_on_record_has_its_time_and_who_was_refused(config: Callable[..., RunConfig]) -> None:
    made, told = config(), [{2: "peft: expected 0.21"}, {}, {}, {}]
    began = datetime.now(UTC).replace(microsecond=0)
    records = begin(made, refused=lambda: told.pop(0))
    rounds = [record for record in records if record["event"] == "round"]
    assert [record.get("refused") for record in rounds] == [{"2": "peft: expected 0.21"}, None, None, None]
    times = [datetime.fromisoformat(record["time"]) for record in rounds]
    assert times == sorted(times)
    assert began <= times[0]
    assert times[-1] <= datetime.now(UTC)


def test_the_learning_rate_is_scheduled_over_the_run(config: Callable[..., RunConfig]) -> None:
    rates = [record["learning_rate"] for record in begin(config()) if record["event"] == "round"]
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] == pytest.approx(0.001)


UNLIKE = {"clients": 3, "cohort": 2, "ranks": {"rule": "listed", "listed": {"ranks": [1, 3, 2]}}}
DRIFTING: list[tuple[str, dict[str, Any]]] = [
    ("lora", {"aggregation": {"merge": {"rule": "flora"}}, "federation": UNLIKE}),
    ("lora", {"aggregation": {"merge": {"rule": "fedex", "fedex": {"budget": 4}}}, "federation": UNLIKE}),
]
"""Runs whose base takes something up."""


# peft asks each model for a property that transformers has renamed.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize(("family", "changes"), [*((family, {}) for family in sorted(FAMILIES)), *DRIFTING])
def test_what_is_deployed_is_what_was_scored(
    tiny_model: Path, config: Callable[..., RunConfig], family: str, changes: dict[str, Any]
) -> None:
    made = config(adapter={"family": family}, **changes)
    end = begin(made)[-1]
    root, adapted = Path(made.out), adapted_model(made)
    final = experiment.strategy_of(made).finalize(checkpoint.load(root / "checkpoint"))
    install(adapted, final)
    found = evaluate(adapted, task_of(made), experiment.test_examples(made), 64)
    assert found["loss"] == pytest.approx(end["evaluation"]["loss"], rel=1e-6)
    source = root / "adapter" if family == "head_only" else tiny_model
    base = transformers.AutoModelForSequenceClassification.from_pretrained(
        str(source), num_labels=3, dtype=torch.float32
    )
    loaded = base if family == "head_only" else peft.PeftModel.from_pretrained(base, str(root / "adapter"))
    assert torch.equal(logits(loaded), logits(adapted.model))


def merged_by(rule: str, **settings: Any) -> dict[str, Any]:
    return {"aggregation": {"merge": {"rule": rule, rule: settings}}}


CASES: list[tuple[str, dict[str, Any]]] = [
    *((family, {}) for family in sorted(FAMILIES)),
    ("lora", {"aggregation": {"stages": {"local": ["classifier.*"]}}}),
    ("lora", {"aggregation": {"stages": {"frozen": ["*.A"]}}}),
    ("ia3", {"aggregation": {"stages": {"local": ["*.key.l"], "frozen": ["classifier.bias"], "clip_norm": 0.05}}}),
    ("lora", {"aggregation": {"stages": {"turns": 2, "silent_below": 2.0, "silent_rounds": 1}}}),
    ("lora", {**merged_by("flora", budget=4), "federation": UNLIKE}),
    ("lora", {**merged_by("fedex"), "federation": UNLIKE}),
    ("lora", {**merged_by("ffa_lora"), "federation": UNLIKE}),
    ("lora", {**merged_by("rolora"), "training": {"scaffold": True}}),
    ("lora", {**merged_by("fedsa_lora"), "federation": UNLIKE, "evaluation": {"on_clients": True}}),
    ("lora", {**merged_by("hetlora", keep=0.5, penalty=10.0)}),
]


@pytest.mark.parametrize(("family", "settings"), CASES)
def test_resumed_is_never_stopped(config: Callable[..., RunConfig], family: str, settings: dict[str, Any]) -> None:
    changes = {**settings, "adapter": {"family": family}, "rounds": 3}
    whole = begun(config("whole", **changes), cut_at(3))
    parts = begun(config("parts", **changes), cut_at(1))
    for watcher in (cut_at(2, replies=1), cut_at(2, replies=2), cut_at(2), cut_at(3, replies=1), cut_at(3)):
        gone_on(parts, watcher)
    assert state(parts) == state(whole)
    assert timeless(journal.read(parts / "journal.jsonl")) == timeless(journal.read(whole / "journal.jsonl"))


def test_a_run_cut_at_every_place_ends_the_same(config: Callable[..., RunConfig]) -> None:
    """What is on disk just before each write of round 2, made from a run that was cut after it."""
    whole, root = begun(config("whole", rounds=3), cut_at(3)), begun(config("cut", rounds=3), cut_at(2))
    torn = (root / "journal.jsonl").read_bytes() + b'{"event":"round","rou'
    pair = [Path("checkpoint") / f"round-000002.{kind}" for kind in ("safetensors", "sha256")]

    def before_the_digest(at: Path) -> None:
        (at / pair[1]).unlink()

    def before_the_state(at: Path) -> None:
        before_the_digest(at)
        (at / pair[0]).unlink()

    def before_the_journal(at: Path) -> None:
        before_the_state(at)
        journal.truncate(at / "journal.jsonl", 1)

    def in_the_journal(at: Path) -> None:
        (at / "journal.jsonl").write_bytes(torn)

    def in_a_file(at: Path) -> None:
        (at / "checkpoint" / ".round-000003.safetensors.x.part").write_bytes(b"x")

    for change in (before_the_digest, before_the_state, before_the_journal, in_the_journal, in_a_file):
        copy = root.with_name(change.__name__)
        shutil.copytree(root, copy)
        change(copy)
        gone_on(copy, cut_at(3))
        assert state(copy) == state(whole), change.__name__
        rounds = [record["round"] for record in journal.read(copy / "journal.jsonl") if record["event"] == "round"]
        assert rounds == [1, 2, 3], change.__name__


def test_a_run_killed_before_its_first_checkpoint_begins_again(config: Callable[..., RunConfig]) -> None:
    def start(record: dict[str, Any], done: int) -> None:
        raise Killed

    whole = begun(config("whole", rounds=2), cut_at(2))
    cut = begun(config("cut", rounds=2), replace(silent(), start=start))
    for left in (["config.toml", "journal.jsonl"], ["config.toml"]):
        copy = cut.with_name(f"left-{len(left)}")
        copy.mkdir()
        for name in left:
            shutil.copy(cut / name, copy / name)
        gone_on(copy, cut_at(2))
        assert state(copy) == state(whole)
        assert [record["event"] for record in journal.read(copy / "journal.jsonl")] == ["start", "round", "round"]


def test_a_run_whose_checkpoints_were_removed_is_not_begun_again(config: Callable[..., RunConfig]) -> None:
    root = begun(config(), cut_at(1))
    before = (root / "journal.jsonl").read_bytes()
    shutil.rmtree(root / "checkpoint")
    with pytest.raises(CheckpointError, match="expected a finished checkpoint, found none"):
        resume(root)
    assert (root / "journal.jsonl").read_bytes() == before


def test_a_finished_run_resumed_ends_as_it_did(config: Callable[..., RunConfig]) -> None:
    made = config(rounds=2)
    first = begin(made)
    before = weights(Path(made.out))
    again = resume(Path(made.out))
    assert weights(Path(made.out)) == before
    assert timeless(again) == timeless(first)
    assert [record["event"] for record in again] == ["start", "round", "round", "resume", "end"]


@pytest.mark.faults
def test_a_folder_that_another_process_writes_is_left_alone(config: Callable[..., RunConfig]) -> None:
    made = config()
    root = Path(made.out)
    with held(root), pytest.raises(RunFolderError, match=f"found process {os.getpid()} at work in it"):
        begin(made)
    assert [path.name for path in root.iterdir()] == []
    begun(made, cut_at(2))
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    with held(root), pytest.raises(RunFolderError, match="at work in it"):
        resume(root)
    assert {path: path.read_bytes() for path in root.rglob("*") if path.is_file()} == before
    resume(root)
    begin(config("whole"))
    assert weights(root) == weights(Path(config("whole").out))


def test_a_run_that_was_begun_meanwhile_is_not_begun_again(config: Callable[..., RunConfig]) -> None:
    made = config()
    folder = folder_for(made)
    begun(made, cut_at(1))
    before = folder.journal.read_bytes()
    with pytest.raises(RunFolderError, match="one that another process has begun meanwhile; continue it with --resume"):
        federate(made, folder, transport(made, folder), engine="local")
    assert folder.journal.read_bytes() == before


def test_a_corrupt_checkpoint_is_one_sentence_and_its_remedy_works(config: Callable[..., RunConfig]) -> None:
    root = begun(config(), cut_at(3))
    expected, before = state(root), (root / "journal.jsonl").read_bytes()
    newest = root / "checkpoint" / "round-000003.safetensors"
    data = bytearray(newest.read_bytes())
    data[-1] ^= 1
    newest.write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match="delete the two files of that round") as caught:
        resume(root)
    assert caught.value.exit_code == 2
    assert (root / "journal.jsonl").read_bytes() == before
    newest.unlink()
    newest.with_suffix(".sha256").unlink()
    gone_on(root, cut_at(3))
    assert state(root) == expected


def test_another_base_under_the_same_name_is_refused(
    tiny_rows: Path, tmp_path: Path, config: Callable[..., RunConfig]
) -> None:
    source = tiny.build(tmp_path / "model")
    made = tiny.run_config(source, tiny_rows, tmp_path / "run", rounds=2)
    begun(made, cut_at(1))
    shutil.rmtree(source)
    tiny.build(source, seed=1)
    release_models()
    with pytest.raises(CheckpointError, match="restore the base model that the run was started with"):
        resume(tmp_path / "run")


def test_local_tensors_never_reach_the_server(config: Callable[..., RunConfig]) -> None:
    made = config(aggregation={"stages": {"local": ["classifier.*"]}}, evaluation={"on_clients": True}, rounds=2)
    records = journal.read(begun(made, cut_at(2)) / "journal.jsonl")
    initial = adapted_model(made).initial.tensors
    final = checkpoint.load(Path(made.out) / "checkpoint").adapter.tensors
    for key, value in final.items():
        assert np.array_equal(value, initial[key]) == key.startswith("classifier"), key
    clients = [record["client_evaluation"] for record in records if record["event"] == "round"]
    servers = [record["evaluation"] for record in records if record["event"] == "round"]
    assert all(found["rows"] > 0 and 0 <= found["accuracy"] <= 1 for found in clients)
    assert clients[-1]["loss"] != pytest.approx(servers[-1]["loss"], rel=1e-3)
    everything = journal.read(begun(config("all"), cut_at(1)) / "journal.jsonl")
    assert records[1]["bytes_up"] == everything[1]["bytes_up"] - 2 * 4 * (3 * 16 + 3)


def test_layers_move_in_their_turn_alone(config: Callable[..., RunConfig]) -> None:
    made = config(aggregation={"stages": {"turns": 2}}, rounds=2)
    root = begun(made, cut_at(1))
    first = checkpoint.load(root / "checkpoint").adapter
    gone_on(root, cut_at(2))
    states = [adapted_model(made).initial.tensors, first.tensors, checkpoint.load(root / "checkpoint").adapter.tensors]
    for number, turn in enumerate(layers_of(first.spec)):
        for key in first.spec.shapes:
            moved = [not np.array_equal(before[key], after[key]) for before, after in itertools.pairwise(states)]
            if key.startswith(f"{turn}."):
                assert moved == [number == 0, number == 1], key
            elif key.startswith("classifier"):
                assert moved == [True, True], key


def test_frozen_tensors_never_move(config: Callable[..., RunConfig]) -> None:
    made = config(aggregation={"stages": {"frozen": ["*.A"]}}, rounds=2)
    begun(made, cut_at(2))
    initial = adapted_model(made).initial.tensors
    final = checkpoint.load(Path(made.out) / "checkpoint").adapter.tensors
    for key, value in final.items():
        assert np.array_equal(value, initial[key]) == key.endswith(".A"), key


@families
def test_an_adapter_that_nodes_build_for_themselves_ends_as_one_that_was_sent(
    config: Callable[..., RunConfig], family: str
) -> None:
    ends = {}
    for first in ("sent", "built"):
        made = config(first, adapter={"family": family}, aggregation={"first": first}, rounds=2)
        records = [record for record in begin(made) if record["event"] == "round"]
        ends[first] = weights(Path(made.out)), records[0]["bytes_down"]
    assert ends["built"][0] == ends["sent"][0]
    assert ends["built"][1] < ends["sent"][1]


LONG = {"sequence_classification": {"max_tokens": 500}}


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"aggregation": {"stages": {"frozen": ["nothing"]}}}, AdapterError, "pattern 'nothing'"),
        ({"aggregation": {"stages": {"frozen": ["*"]}}}, PlanError, "found all frozen"),
        ({"adapter": {"lora": {"target_modules": ["nothing"]}}}, Exception, r"adapter\.lora"),
        ({"model": {"source": "/nowhere", "device": "cpu"}}, Exception, r"model\.source"),
        (
            {"adapter": {"family": "prompt_tuning", "prompt_tuning": {"virtual_tokens": 9}}, "task": LONG},
            PlanError,
            r"max_tokens: expected at most 31 \(40 positions less 9 virtual tokens\), found 32",
        ),
        ({"federation": {"clients": 99, "cohort": 2}}, Exception, "rows at each of 99 sites"),
        ({"task": {"sequence_classification": {"labels": ["no", "yes"]}}}, Exception, "found 'maybe'"),
    ],
)
def test_a_plan_that_cannot_be_carried_out_leaves_nothing(
    config: Callable[..., RunConfig], changes: dict[str, Any], error: type[Exception], words: str
) -> None:
    made = config(**changes)
    with pytest.raises(error, match=words):
        begin(made)
    assert not Path(made.out).exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"federation": {"ranks": {"rule": "listed", "listed": {"ranks": [2, 9]}}}}, "of at most 3, .* found 9"),
        ({"federation": {"ranks": {"rule": "declared", "declared": {"default": 8}}}}, "of at most 3, .* found 8"),
        ({**merged_by("krum")}, "at least 5 updates in every round, .* found 1"),
        ({**merged_by("median"), "federation": {**UNLIKE, "quorum": 2}}, "one rank for all nodes"),
        ({**merged_by("fed_sb")}, "set adapter.family=lora_sb"),
        ({**merged_by("flora"), "adapter": {"family": "ia3"}}, "for adapters of family ia3"),
        ({"training": {"scaffold": True}, **merged_by("flora")}, "training.scaffold"),
        (
            {"adapter": {"family": "fish_mask"}, "aggregation": {"first": "built"}},
            "aggregation.first: expected sent, because what fish_mask trains is chosen by rows",
        ),
    ],
)
def test_a_plan_against_the_law_leaves_nothing(
    config: Callable[..., RunConfig], changes: dict[str, Any], words: str
) -> None:
    made = config(**changes)
    with pytest.raises(PlanError, match=words):
        begin(made)
    assert not Path(made.out).exists()


def test_an_update_past_the_bound_is_refused_and_the_run_goes_on(config: Callable[..., RunConfig]) -> None:
    plain = journal.read(begun(config("plain", federation={"cohort": 3}), cut_at(1)) / "journal.jsonl")[1]
    norms = sorted(client["update_norm"] for client in plain["clients"])
    bound = (norms[1] + norms[2]) / 2
    made = config(federation={"cohort": 3, "most_update_norm": bound})
    found = journal.read(begun(made, cut_at(1)) / "journal.jsonl")[1]
    assert [len(found["clients"]), len(found["failures"])] == [2, 1]
    assert f"expected a norm of at most {bound:g}, found {norms[2]:g}" in found["failures"][0]["reason"]
    assert max(client["update_norm"] for client in found["clients"]) <= bound


def test_nodes_of_unlike_rank_train_what_they_can_hold(config: Callable[..., RunConfig]) -> None:
    made = config(federation={**UNLIKE, "cohort": 3}, rounds=2)
    rounds = [record for record in begin(made) if record["event"] == "round"]
    spec = adapted_model(made).spec
    head = 3 * 16 + 3
    for record in rounds:
        assert [client["rank"] for client in record["clients"]] == [1, 3, 2]
        # Four modules of 16 x 16 in each rank, and the head; the rest of a packet is its manifest.
        up = [client["bytes_up"] for client in record["clients"]]
        assert up[1] - up[0] == 2 * (up[2] - up[0]) == 2 * 4 * 4 * 32
        assert 4 * (4 * 32 + head) < up[0] < 4 * (4 * 32 + head) + 1000
        assert set(record["merge_errors"]) == {module.path for module in spec.modules if module.rank}


def test_what_went_into_the_base_is_deployed_with_the_adapter(config: Callable[..., RunConfig]) -> None:
    made = config(**merged_by("fedex"), federation=UNLIKE, rounds=2)
    records = begin(made)
    settings = json.loads((Path(made.out) / "adapter" / "adapter_config.json").read_text())
    taken_up = [record["residual_rank"] for record in records if record["event"] == "round"]
    assert taken_up[0] > 0
    assert settings["r"] == 3 + taken_up[-1]
    errors = [record["merge_error"] for record in records if record["event"] == "round"]
    assert all(error < 1e-6 for error in errors)


def test_a_missed_quorum_leaves_what_was_recorded(config: Callable[..., RunConfig]) -> None:
    made = config(federation={"clients": 3, "cohort": 2, "deadline_seconds": 1e-9})
    with pytest.raises(QuorumError, match="round 1: expected at least 1 usable updates, found 0") as caught:
        begin(made)
    assert caught.value.exit_code == 1
    start, missed, failed = journal.read(Path(made.out) / "journal.jsonl")
    assert (start["event"], missed["event"], failed["event"]) == ("start", "missed", "failed")
    assert (missed["round"], missed["least"], missed["usable"], len(missed["cohort"])) == (1, 1, [], 2)
    assert [failure["kind"] for failure in missed["failures"]] == ["absent"] * 2
    assert datetime.fromisoformat(missed["time"]) <= datetime.now(UTC)
    assert checkpoint.load(Path(made.out) / "checkpoint").round == 0
    with pytest.raises(QuorumError):
        resume(Path(made.out))
    events = [record["event"] for record in journal.read(Path(made.out) / "journal.jsonl")]
    assert events == ["start", "missed", "resume", "missed", "failed"]


@pytest.mark.faults
def test_a_journal_that_cannot_be_written_is_one_sentence(config: Callable[..., RunConfig]) -> None:
    made = config()

    def block(record: dict[str, Any], done: int) -> None:
        path = Path(made.out) / "journal.jsonl"
        path.unlink()
        path.mkdir()

    with pytest.raises(RunFolderError, match=r"journal\.jsonl: expected room to write it, found .*; free disk space"):
        begin(made, watcher=replace(silent(), start=block))


def test_the_watcher_hears_of_everything_in_order(config: Callable[..., RunConfig]) -> None:
    told: list[tuple[Any, ...]] = []
    watcher = Watcher(
        start=lambda record, done: told.append(("start", record["event"], done)),
        reply=lambda number, partition, usable: told.append(("reply", number, usable)),
        round=lambda record: told.append(("round", record["round"])),
        bound=lambda name: told.append(("bound", name)),
    )
    begin(config(rounds=2), watcher=watcher)
    per_round = [[("reply", r, True), ("reply", r, True), ("round", r)] for r in (1, 2)]
    assert told == [("start", "start", 0), *per_round[0], *per_round[1]]


def test_early_stopping_ends_the_run_and_is_kept_by_a_resume(config: Callable[..., RunConfig]) -> None:
    made = config(training={"learning_rate": 1e-12}, evaluation={"patience": 2})
    end = begin(made)[-1]
    assert (end["rounds"], end["stopped"]) == (3, "early")
    assert resume(Path(made.out))[-1]["stopped"] == "early"


def test_runs_of_the_same_settings_end_in_the_same_adapter(config: Callable[..., RunConfig]) -> None:
    one, other = (begun(config(name, rounds=2), cut_at(2)) for name in ("one", "other"))
    assert state(one) == state(other)
    assert checkpoint.load(one / "checkpoint").run != checkpoint.load(other / "checkpoint").run
    assert state(begun(config("seed", rounds=2, seed=6), cut_at(2)))["adapter"] != state(one)["adapter"]


def test_nodes_lower_their_own_rank(config: Callable[..., RunConfig]) -> None:
    made = config(**merged_by("hetlora", keep=0.5, penalty=100.0), federation={"cohort": 3})
    records = [record for record in begin(made) if record["event"] == "round"]
    ranks = np.array([[client["rank"] for client in record["clients"]] for record in records])
    assert np.all(np.diff(ranks, axis=0) <= 0)
    assert set(ranks[0].tolist()) <= {1, 3}
    assert ranks.min() == 1
