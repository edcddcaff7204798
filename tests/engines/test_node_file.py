"""A node that has a file of its own settings, asked as a server asks it."""

from __future__ import annotations

import csv
import gc
import json
import logging
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, Message, MessageType, RecordDict

from fedpeft.config import RunConfig, digest, from_tree, override, to_flat, to_tree
from fedpeft.engines import flower_client
from fedpeft.engines.flower_client import MODEL_VARIABLE, NODE_VARIABLE, Row, client_app
from fedpeft.engines.flower_messages import to_packet, to_records
from fedpeft.experiment import adapted_model, resolve, strategy_of
from fedpeft.loaded import loaded
from fedpeft.memory import FolderMemory
from fedpeft.nodes import needed_bytes
from fedpeft.requests import describe_request, fit_request
from fedpeft.updates import Memory, ServerState
from fedpeft.wire import Packet, Session
from tests import tiny

Ask = Callable[..., Packet]


@pytest.fixture
def rows_file(tiny_rows: Path, tmp_path: Path) -> Path:
    """Rows as a site might have them: other columns than the server's, another format."""
    path = tmp_path / "reviews.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file, delimiter=";")
        writer.writerow(["number", "review", "stars"])
        for at, line in enumerate(tiny_rows.read_text().splitlines()[:24]):
            row = json.loads(line)
            writer.writerow([at, row["text"], row["label"]])
    return path


@pytest.fixture
def node_file(rows_file: Path, tiny_model: Path, tmp_path: Path) -> Callable[..., Path]:
    """A node's file, with more text at its beginning."""

    def write(top: str = "", limits: str = "", required: str = "", data: str = "") -> Path:
        path = tmp_path / "node.toml"
        own = """source = "csv"\n[data.csv]\npath = "reviews.csv"\ndelimiter = ";"\n"""
        own += """columns = { text = "review", label = "stars" }"""
        path.write_text(
            f"partition = 2\n{top}\n[limits]\n{limits}\n[required]\n{required}\n"
            f'[model]\nfolder = "{tiny_model}"\n[data]\n{data or own}\n'
        )
        return path

    return write


@pytest.fixture
def ask(
    tiny_model: Path, tiny_rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_a_flower_run: int
) -> Ask:
    """What a node answers to a request of kind `kind` in a run of `overrides`."""
    monkeypatch.setenv("FEDPEFT_HOME", str(tmp_path / "home"))
    monkeypatch.delenv(MODEL_VARIABLE, raising=False)
    monkeypatch.delenv(NODE_VARIABLE, raising=False)

    def one(
        *overrides: str, kind: str = "fit", own_rows: Any = None, node: Path | int | None = None, **node_config: Any
    ) -> Packet:
        config = override(resolve(tiny.run_config(tiny_model, tiny_rows, tmp_path / "run")), overrides)
        adapted = adapted_model(config)
        session = Session("run", digest(config), adapted.spec.digest)
        state = ServerState("run", 0, 0, adapted.initial)
        fit = fit_request(strategy_of(config), state, session, 2)
        request = fit if kind == "fit" else describe_request(state, session)
        # What the server's settings name is not there on the node.
        sent = override(config, ["model.source=/srv/model", "data.origin.jsonl.path=/srv/rows.jsonl"])
        packet = Packet(request.kind, {**request.manifest, "config": digest(sent)}, request.body)
        if node is not None:
            node_config["node"] = node if isinstance(node, int) else str(node)
        message = Message(to_records(packet, to_flat(sent)), 1, MessageType.TRAIN)
        return to_packet(client_app(own_rows)(message, Context(1, 1, node_config, RecordDict(), {})).content)

    return one


def test_a_node_trains_on_the_rows_that_its_file_names(
    ask: Ask, node_file: Callable[..., Path], rows_file: Path, monkeypatch: pytest.MonkeyPatch, tiny_model: Path
) -> None:
    update = ask(node=node_file(), **{"seconds.receive": 0.25, "seconds.send": -1.0})
    assert update.kind == "update", update.manifest.get("reason")
    assert update.manifest["partition"] == 2
    phases = {phase: float(update.manifest[f"metric.seconds.{phase}"]) for phase in ("receive", "train", "send")}
    assert phases["train"] > 0
    assert (phases["receive"], phases["send"]) == (0.25, -1.0)

    def own_rows(config: RunConfig) -> list[Row]:
        with rows_file.open(newline="") as file:
            return [Row(record["review"], record["stars"]) for record in csv.DictReader(file, delimiter=";")]

    monkeypatch.setenv(MODEL_VARIABLE, str(tiny_model))
    by_code = ask(own_rows=own_rows, **{"partition-id": 2})
    assert by_code.body == update.body


def test_the_environment_names_the_file_and_code_wins_over_it(
    ask: Ask, node_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(NODE_VARIABLE, str(node_file(data='source = "csv"\ncsv = { path = "absent.csv" }')))
    assert ask().kind == "failure"
    seen = []

    def own_rows(config: RunConfig) -> list[Row]:
        seen.append(config.model.source)
        return [Row("good film", "no"), Row("fine shop", "maybe")]

    assert ask(own_rows=own_rows).kind == "update"
    assert len(seen) == 1


@pytest.mark.parametrize(
    ("top", "node_config", "rank"), [("rank = 2", {}, 2), ("rank = 2", {"rank": 1}, 1), ("", {}, 0)]
)
def test_a_node_says_the_rank_and_the_memory_of_its_file(
    ask: Ask, node_file: Callable[..., Path], top: str, node_config: dict[str, Any], rank: int
) -> None:
    answer = ask(kind="describe", node=node_file(top, "memory_gigabytes = 1.5"), **node_config)
    assert answer.kind == "description", answer.manifest.get("reason")
    assert (answer.manifest["rank"], answer.manifest["memory_bytes"]) == (rank, 1_500_000_000)


@pytest.mark.parametrize("profile", ["edge-cpu", "laptop"])
def test_a_node_of_each_profile_without_a_gpu_trains(ask: Ask, node_file: Callable[..., Path], profile: str) -> None:
    update = ask("training.batch_size=16", node=node_file(f'profile = "{profile}"'))
    assert update.kind == "update", update.manifest.get("reason")
    assert update.manifest["examples"] == 2 * 16


@pytest.mark.parametrize(
    ("overrides", "file", "expected"),
    [
        ((), {"required": "clip_norm = 1.0"}, "this node's required.clip_norm: expected updates clipped"),
        (("aggregation.stages.clip_norm=2",), {"required": "clip_norm = 1.0"}, "found 2;"),
        ((), {"required": "noise_multiplier = 0.5"}, "this node's required.noise_multiplier: expected noise"),
        ((), {"required": "secure_aggregation = true"}, "this node's required.secure_aggregation: expected secure"),
        ((), {"top": "rank = 2"}, "fit request, rank: expected at most 2"),
        ((), {"limits": "memory_gigabytes = 0.1"}, "memory to train on this node: expected at most 0.1 GB"),
        ((), {"limits": "round_minutes = 1e-9"}, "round on this node: expected at most"),
        ((), {"limits": "tokens = 8"}, "expected at most 8, this node's limits.tokens, found 16"),
    ],
)
def test_a_run_that_asks_too_much_or_protects_too_little_is_refused(
    ask: Ask,
    node_file: Callable[..., Path],
    caplog: pytest.LogCaptureFixture,
    overrides: tuple[str, ...],
    file: dict[str, str],
    expected: str,
) -> None:
    with caplog.at_level(logging.WARNING, "fedpeft"):
        answer = ask(*overrides, node=node_file(**file))
    assert answer.kind == "failure"
    assert expected in str(answer.manifest["reason"])
    assert expected in caplog.text
    assert not answer.body


def test_a_run_that_protects_enough_is_taken_part_in(ask: Ask, node_file: Callable[..., Path]) -> None:
    update = ask("aggregation.stages.clip_norm=0.001", node=node_file(required="clip_norm = 0.001"))
    assert update.kind == "update"
    assert float(update.manifest["metric.update_norm"]) <= 0.001


def test_the_base_of_a_run_before_leaves_memory_where_it_is_in_the_way(
    ask: Ask, node_file: Callable[..., Path]
) -> None:
    def models() -> list[weakref.ref[Any]]:
        gc.collect()
        return [weakref.ref(found.model) for _, found in loaded.kept()]

    loaded.cache_clear()
    flower_client._site.cache_clear()
    assert ask("seed=1", node=node_file()).kind == "update"
    ((_, site),) = flower_client._site.kept()
    needed = needed_bytes(site.learner)  # type: ignore[arg-type]
    del site
    first = models()
    assert ask("seed=2", node=node_file(limits=f"memory_gigabytes = {2 * needed / 1e9}")).kind == "update"
    assert len(models()) > len(first)
    assert all(model() is not None for model in first)
    answer = ask("seed=3", node=node_file(limits=f"memory_gigabytes = {(needed + 1000) / 1e9}"))
    assert answer.kind == "update", answer.manifest.get("reason")
    assert len(models()) == len(flower_client._site.kept()) == 1
    assert all(model() is None for model in first)


def test_what_the_oldest_runs_left_on_the_disk_is_removed(
    ask: Ask, node_file: Callable[..., Path], tmp_path: Path
) -> None:
    for partition in (2, 3):
        FolderMemory(tmp_path / "home" / "nodes").save("old", partition, 1, Memory())
    assert ask(node=node_file()).kind == "update"
    assert ask(node=node_file(limits="kept_runs = 1")).kind == "update"
    left = {str(path.relative_to(tmp_path / "home" / "nodes")) for path in tmp_path.glob("home/nodes/*/*")}
    assert left == {"old/partition-3", "run/partition-2"}


def test_what_rows_hold_and_where_they_are_stays_on_the_node(
    ask: Ask, node_file: Callable[..., Path], rows_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    text = rows_file.read_text()
    rows_file.write_text(text + "25;the patient of room 9;secret-diagnosis\n")
    with caplog.at_level(logging.WARNING, "fedpeft"):
        reason = str(ask(node=node_file()).manifest["reason"])
    assert reason.startswith("rows of this node: expected rows that the run's task can use")
    assert "secret" not in reason
    assert "secret-diagnosis" in caplog.text
    rows_file.unlink()
    reason = str(ask(node=node_file()).manifest["reason"])
    assert str(rows_file.parent) not in reason


def test_where_a_nodes_model_is_stays_on_the_node(
    ask: Ask, node_file: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = node_file()
    path.write_text(
        "\n".join('folder = "no-model"' if "folder" in line else line for line in path.read_text().split("\n"))
    )
    with caplog.at_level(logging.WARNING, "fedpeft"):
        reason = str(ask(node=path).manifest["reason"])
    assert reason.startswith("model.source (a path of this node): expected a model")
    assert str(tmp_path) not in reason
    assert str(tmp_path / "no-model") in caplog.text


@pytest.mark.parametrize(
    ("node", "expected"),
    [
        (Path("/absent/node.toml"), "node file: expected settings that are valid"),
        (3, "node-config, node: expected the"),
    ],
)
def test_a_file_with_a_mistake_is_one_sentence(ask: Ask, node: Path | int, expected: str) -> None:
    answer = ask(node=node)
    assert answer.kind == "failure"
    assert str(answer.manifest["reason"]).startswith(expected)
    assert "/absent" not in str(answer.manifest["reason"])


def test_a_request_that_says_nothing_of_its_round_does_not_end_the_node(
    node_file: Callable[..., Path], ask: Ask, tiny_model: Path, tiny_rows: Path, tmp_path: Path
) -> None:
    config = from_tree({**to_tree(tiny.run_config(tiny_model, tiny_rows, tmp_path / "run")), "rounds": 1})
    sent = to_flat(override(config, ["task.sequence_classification.labels=no,maybe,yes"]))
    message = Message(to_records(Packet("fit"), sent), 1, MessageType.TRAIN)
    context = Context(1, 1, {"node": str(node_file())}, RecordDict(), {})
    answer = to_packet(client_app()(message, context).content)
    assert answer.kind == "failure"
    assert "field run: expected" in str(answer.manifest["reason"])
