from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, Message, MessageType, RecordDict
from safetensors.numpy import load_file, save_file

from fedpeft.config import RunConfig, digest, override, to_flat
from fedpeft.engines.flower_client import MODEL_VARIABLE, NODE_VARIABLE, Row, Task, client_app, task_of
from fedpeft.engines.flower_messages import to_packet, to_records
from fedpeft.errors import PacketError
from fedpeft.experiment import adapted_model
from fedpeft.logs import Line
from fedpeft.nodes import followed
from fedpeft.requests import describe_request
from fedpeft.skew import LIBRARIES, Installation, installed
from fedpeft.updates import ServerState
from fedpeft.version import VERSION
from fedpeft.wire import Packet, Session
from tests import tiny


@pytest.fixture(autouse=True)
def a_node(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, in_a_flower_run: int) -> None:
    monkeypatch.setenv("FEDPEFT_HOME", str(tmp_path / "home"))
    monkeypatch.delenv(MODEL_VARIABLE, raising=False)
    monkeypatch.delenv(NODE_VARIABLE, raising=False)


def own_rows(config: RunConfig) -> list[Row]:
    return [Row("fine", "positive")]


def ask(packet: Packet, *overrides: str, node_config: dict[str, int | str] | None = None) -> Packet:
    settings = to_flat(override(RunConfig(), overrides))
    message = Message(to_records(packet, settings), 1, MessageType.TRAIN)
    given = {"partition-id": 4} if node_config is None else node_config
    reply = client_app()(message, Context(1, 1, given, RecordDict(), {}))
    return to_packet(reply.content)


def test_a_node_says_who_it_is_and_loads_nothing_for_another_fedpeft(tmp_path: Path) -> None:
    answer = ask(Packet("introduce", {"version": "another"}))
    assert answer == Packet("introduction", {**Installation().fields, "partition": 4})
    assert {answer.manifest[f"library.{name}"] for name in LIBRARIES} == set(installed().values())
    assert answer.manifest["base"] == answer.manifest["adapter"] == ""


def test_a_node_says_which_base_it_has_and_which_adapter_it_makes_of_it(
    tiny_model: Path, tiny_rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(MODEL_VARIABLE, str(tiny_model))
    config = tiny.run_config(tiny_model, tiny_rows, tmp_path / "run")
    spec = adapted_model(config).spec

    def says(overrides: Sequence[str], **node_config: int | str) -> dict[str, Any]:
        message = Message(
            to_records(Packet("introduce", {"version": VERSION}), to_flat(override(config, overrides))),
            1,
            MessageType.QUERY,
        )
        context = Context(1, 1, {"partition-id": 1, **node_config}, RecordDict(), {})
        answer = to_packet(client_app(own_rows)(message, context).content)
        assert answer.kind == "introduction"
        return dict(answer.manifest)

    same = Installation(base=spec.base_model, adapter=spec.digest)
    assert says([]) == {**same.fields, "partition": 1}
    assert says([], weights="bfloat16") == {**same.fields, "partition": 1}
    other = says(["adapter.lora.rank=5"])
    assert (other["base"], other["adapter"] != same.adapter) == (same.base, True)
    # A base that the adapter does not fit is told all the same.
    assert says(['adapter.lora.target_modules=["nowhere"]']) == {**same.fields, "adapter": "", "partition": 1}
    another = shutil.copytree(tiny_model, tmp_path / "another")
    tensors = load_file(another / "model.safetensors")
    save_file({key: value + 1 for key, value in tensors.items()}, another / "model.safetensors", {"format": "pt"})
    monkeypatch.setenv(MODEL_VARIABLE, str(another))
    assert says([])["base"] not in ("", same.base)
    # What it has not got, or does not take part in, it says when it is asked for more.
    monkeypatch.setenv(MODEL_VARIABLE, str(tmp_path / "absent"))
    assert says([]) == {**Installation().fields, "partition": 1}


def test_a_node_that_is_turned_away_logs_why(caplog: pytest.LogCaptureFixture) -> None:
    why = "libraries of the node: expected peft 0.21, found peft 0.20.0; run there: pip install 'peft==0.21.2'."
    with caplog.at_level(logging.WARNING, "fedpeft"):
        ask(Packet("turned_away", {"version": VERSION, "reason": why}))
        ask(Packet("turned_away", {"version": VERSION, "reason": f"one\nline {'x' * 1000}"}))
    lines = [Line("text").format(record) for record in caplog.records]
    assert lines[0].endswith(f"the server does not let this node take part: {why}")
    assert "one line xxx" in lines[1]
    assert len(lines[1]) < 700


@pytest.mark.parametrize("partition", [None, "4", -1, 1.5, True])
def test_a_node_without_a_partition_says_what_it_needs(partition: int | str | None) -> None:
    answer = ask(Packet("introduce"), node_config={} if partition is None else {"partition-id": partition})
    assert answer.kind == "failure"
    assert 'start the node with --node-config "partition-id=0"' in str(answer.manifest["reason"])


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (("data.origin=jsonl", "data.origin.jsonl.path=/etc/passwd"), "nothing that the server sends can name data"),
        (
            ("data.origin=csv", "data.origin.csv.path=rows.csv"),
            "give the node its own rows in its node file, or in clients/app.py",
        ),
        (
            ("data.origin=hub", "data.origin.hub.name=/data"),
            "give the node its own rows in its node file, or in clients/app.py",
        ),
        (
            ("model.source=/srv/model",),
            f"name the node's own folder as model.folder in its file, or in {MODEL_VARIABLE}",
        ),
        (("model.source=../model",), "model.source: expected asset:NAME or a Hub name"),
        (("model.source=asset:../../model",), "model.source: expected asset:NAME or a Hub name"),
        (("model.source=fedpeft",), "model.source: expected asset:NAME or a Hub name"),
    ],
)
def test_nothing_that_the_server_sends_names_a_file_on_a_node(
    overrides: tuple[str, ...], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "fedpeft").mkdir()
    monkeypatch.chdir(tmp_path)
    answer = ask(Packet("fit", {"run": "r", "round": 1}), *overrides)
    assert answer.kind == "failure"
    assert expected in str(answer.manifest["reason"])
    assert not (tmp_path / "home").exists()


def test_own_rows_and_an_own_model_take_the_place_of_the_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    config = override(RunConfig(), ["data.origin=jsonl", "model.source=/srv/model", "out=/srv/run"])
    with pytest.raises(PacketError, match="own folder"):
        followed(config, own_rows)
    monkeypatch.setenv(MODEL_VARIABLE, "/data/model")
    mine = followed(config, own_rows)
    assert mine.model.source == "/data/model"
    assert mine.out == ""
    for source in ("asset:minilm", "sentence-transformers/all-MiniLM-L6-v2"):
        monkeypatch.delenv(MODEL_VARIABLE, raising=False)
        assert followed(override(RunConfig(), [f"model.source={source}"]), None).model.source == source


@pytest.fixture
def described(
    tiny_model: Path, tiny_rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Packet]:
    """What a node with rows and a model of its own answers when it is asked to describe itself."""
    monkeypatch.setenv(MODEL_VARIABLE, str(tiny_model))
    config = tiny.run_config(tiny_model, tiny_rows, tmp_path / "run")
    adapted = adapted_model(config)
    session = Session("run", digest(config), adapted.spec.digest)
    request = describe_request(ServerState("run", 0, 0, adapted.initial), session)

    def rows(config: RunConfig) -> list[Row]:
        return [Row("good film", "no"), Row("fine shop", "maybe")]

    def describe(own_task: Callable[[RunConfig], Task] | None = None, **node_config: int | str) -> Packet:
        message = Message(to_records(request, to_flat(config)), 1, MessageType.QUERY)
        context = Context(1, 1, {"partition-id": 1, **node_config}, RecordDict(), {})
        return to_packet(client_app(rows, own_task)(message, context).content)

    return describe


@pytest.mark.parametrize(("node_config", "rank"), [({}, 0), ({"rank": 2}, 2), ({"rank": 64}, 64)])
def test_a_node_says_the_rank_that_it_was_started_with(
    described: Callable[..., Packet], node_config: dict[str, int], rank: int
) -> None:
    answer = described(**node_config)
    assert answer.kind == "description", answer.manifest.get("reason")
    assert answer.manifest["rank"] == rank
    assert (answer.manifest["partition"], answer.manifest["round"]) == (1, 1)
    memory = answer.manifest["memory_bytes"]
    assert type(memory) is int
    assert memory > 0


def test_a_node_reads_its_rows_by_the_task_that_it_brings_along(described: Callable[..., Packet]) -> None:
    seen: list[list[Row]] = []

    def own_task(config: RunConfig) -> Task:
        given = task_of(config)

        def encode(rows: Sequence[Row], tokenizer: Any, place: str) -> tuple[Any, ...]:
            seen.append(list(rows))
            return given.encode(rows[:1], tokenizer, place)

        return given._replace(encode=encode)

    answer = described(own_task)
    assert answer.kind == "description", answer.manifest.get("reason")
    assert [[row.text for row in rows] for rows in seen] == [["good film", "fine shop"]]


@pytest.mark.parametrize("rank", ["4", -1, 2.5, True])
def test_a_rank_that_is_none_is_one_sentence(described: Callable[..., Packet], rank: int | str) -> None:
    answer = described(rank=rank)
    assert answer.kind == "failure"
    assert "node-config, rank: expected an integer from 1, found" in str(answer.manifest["reason"])


def test_a_node_holds_the_base_in_its_own_way(described: Callable[..., Packet]) -> None:
    plain, own = described(), described(weights="bfloat16", gradient_checkpointing=True)
    assert plain.kind == own.kind == "description"
    assert {**own.manifest, "metric.seconds": 0} == {**plain.manifest, "metric.seconds": 0}


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("weights", "int3", "node-config, weights: expected one of float32"),
        ("weights", 4, "node-config, weights: expected"),
        ("gradient_checkpointing", "yes", "write gradient_checkpointing=true in --node-config"),
    ],
)
def test_a_way_that_there_is_not_is_one_sentence(
    described: Callable[..., Packet], key: str, value: int | str, expected: str
) -> None:
    answer = described(**{key: value})
    assert answer.kind == "failure"
    assert expected in str(answer.manifest["reason"])


@pytest.mark.parametrize(
    ("override_text", "expected"),
    [
        ("adapter.prompt_tuning.virtual_tokens=1000000000", "adapter.prompt_tuning.virtual_tokens: expected at most"),
        ("adapter.lora.rank=1000000000", "adapter.lora.rank: expected at most"),
        ("task.sequence_classification.max_tokens=1000000000", "max_tokens: expected at most"),
        ("compute.threads=1000000000", "compute.threads: expected at most"),
        ('adapter.lora.rank_pattern=["(a+)+$ = 2"]', "adapter.lora.rank_pattern: expected patterns of letters"),
        ('adapter.lora.options=["megatron_core = \\"antigravity\\""]', "adapter.lora.options: expected numbers"),
    ],
)
def test_settings_beyond_reason_are_refused_before_anything_is_read(
    override_text: str, expected: str, tmp_path: Path
) -> None:
    answer = ask(Packet("fit", {"run": "r", "round": 1}), override_text)
    assert answer.kind == "failure"
    assert expected in str(answer.manifest["reason"])
    assert not (tmp_path / "home").exists()
