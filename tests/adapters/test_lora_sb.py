"""The family, and federations of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers

from fedpeft import checkpoint, journal
from fedpeft.adapters import AdapterState, at_rank, factors, lora_sb, low_rank_modules
from fedpeft.bounds import BOUNDS, measure_bounds
from fedpeft.client import FitJob
from fedpeft.codecs import dense
from fedpeft.commands.export import run_export
from fedpeft.config import RunConfig, from_tree
from fedpeft.config.adapters import LoraSb
from fedpeft.errors import ConfigError
from fedpeft.experiment import adapted_model, evaluator_of, learner_of, site_examples
from fedpeft.federate import Watcher, federate, silent
from fedpeft.models import install
from fedpeft.runs import folder_for, reopen
from fedpeft.wire import Failure, Packet, Transport
from tests import tiny
from tests.tiny import logits

pytestmark = pytest.mark.usefixtures("one_thread")

FAMILY = lora_sb(rank=2, alpha=4, dropout=0, target_modules=(), layers=())
MODULES, HEAD = 4, 3 * 16 + 3
"""Of the tiny model: query and value in two layers, and the numbers of the head."""


@dataclass
class Overheard:
    """A transport that keeps what passes through another: (request, reply) of each exchange, by partition."""

    through: Transport
    rounds: list[dict[int, tuple[Packet, Packet | Failure]]] = field(default_factory=list)

    def partitions(self) -> tuple[int, ...]:
        return self.through.partitions()

    def exchange(
        self, requests: Mapping[int, Packet], timeout_seconds: float
    ) -> Iterator[tuple[int, Packet | Failure]]:
        self.rounds.append({})
        for partition, reply in self.through.exchange(requests, timeout_seconds):
            self.rounds[-1][partition] = (requests[partition], reply)
            yield partition, reply


class Killed(BaseException):
    """Stands for a kill: nothing in the run catches it."""


PLAIN: dict[str, Any] = {
    "adapter": {"family": "lora_sb", "lora_sb": {"rank": 3, "alpha": 5.0}},
    "aggregation": {"merge": {"rule": "fed_sb"}},
    "federation": {"clients": 3, "cohort": 3},
    "rounds": 2,
}


@pytest.fixture
def config(tiny_model: Path, tiny_rows: Path, tmp_path: Path) -> Callable[..., RunConfig]:
    def made(out: str = "run", **changes: Any) -> RunConfig:
        return tiny.run_config(tiny_model, tiny_rows, tmp_path / out, **{**PLAIN, **changes})

    return made


def listed(*ranks: int, **more: Any) -> dict[str, Any]:
    return {"clients": 3, "cohort": 3, "ranks": {"rule": "listed", "listed": {"ranks": list(ranks)}}, **more}


@dataclass(frozen=True)
class Ran:
    """A run that is over: what passed over the wire, the journal's rounds, the adapter before and after."""

    config: RunConfig
    exchanges: list[dict[int, tuple[Packet, Packet | Failure]]]
    rounds: list[dict[str, Any]]
    initial: AdapterState
    final: AdapterState


def run(config: RunConfig) -> Ran:
    folder = folder_for(config)
    overheard = Overheard(tiny.transport(config, folder))
    records = federate(config, folder, overheard, engine="local")
    rounds = [record for record in records if record["event"] == "round"]
    final = checkpoint.load(Path(config.out) / "checkpoint").adapter
    return Ran(config, overheard.rounds, rounds, adapted_model(config).initial, final)


RANKS = ((3, 3, 3), (1, 2, 3))


@pytest.fixture(scope="module", params=RANKS, ids=str)
def ran(
    request: pytest.FixtureRequest, tiny_model: Path, tiny_rows: Path, tmp_path_factory: pytest.TempPathFactory
) -> Ran:
    """Three rounds of three clients at equal and at unlike ranks."""
    out, changes = tmp_path_factory.mktemp("ran") / "run", {**PLAIN, "federation": listed(*request.param), "rounds": 3}
    return run(tiny.run_config(tiny_model, tiny_rows, out, **changes))


def ranks_of(ran: Ran) -> tuple[int, ...]:
    return tuple(ran.config.federation.ranks.chosen.ranks)


def numbers(rank: int) -> int:
    """What travels of an adapter of this rank once the factors are known."""
    return MODULES * rank * rank + HEAD


@pytest.mark.parametrize(
    ("parameter", "place"),
    [
        ("base_model.model.bert.q.lora_A.default.weight", ("bert.q", "lora_sb", "A")),
        ("base_model.model.bert.q.lora_B.default.basis", ("bert.q", "lora_sb", "B")),
        ("base_model.model.bert.q.lora_B.default.square", ("bert.q", "lora_sb", "R")),
        ("base_model.model.classifier.modules_to_save.default.weight", ("classifier", "full", "weight")),
    ],
)
def test_parameter_is_located(parameter: str, place: tuple[str, str, str]) -> None:
    assert FAMILY.locate(parameter) == place


def test_peft_is_asked_for_a_lora_of_these_settings() -> None:
    family = lora_sb(rank=6, alpha=3.0, dropout=0.1, target_modules=("query",), layers=(1,))
    assert dict(family.peft) == {
        "peft_type": "LORA",
        "r": 6,
        "lora_alpha": 3.0,
        "lora_dropout": 0.1,
        "use_rslora": False,
        "target_modules": ["query"],
        "layers_to_transform": [1],
    }
    assert (family.folded, family.ranked) == ("R", "A")


def test_settings_reach_the_family(config: Callable[..., RunConfig]) -> None:
    chosen = config(adapter={"family": "lora_sb", "lora_sb": {"rank": 2, "layers": [1]}}).adapter.chosen
    assert chosen == LoraSb(rank=2, layers=(1,))
    assert chosen.build().peft["r"] == 2
    assert LoraSb().alpha / LoraSb().rank == 1


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rank": 0}, r"adapter\.lora_sb\.rank: expected"),
        ({"alpha": 0.0}, r"adapter\.lora_sb\.alpha: expected a number above 0, found 0\.0"),
        ({"dropout": 1.0}, r"adapter\.lora_sb\.dropout: expected"),
        ({"rank_stabilised": True}, r"adapter\.lora_sb\.rank_stabilised"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        from_tree({"adapter": {"family": "lora_sb", "lora_sb": settings}})


def test_a_federation_moves_the_squares_and_nothing_else_of_the_adapter(ran: Ran) -> None:
    assert ran.final.spec == ran.initial.spec
    for key, value in ran.initial.tensors.items():
        assert (ran.final.tensors[key].tobytes() == value.tobytes()) == key.endswith((".A", ".B")), key
    for record in ran.rounds:
        assert record["failures"] == []
        assert [client["rank"] for client in record["clients"]] == list(ranks_of(ran))
        assert record["merge_error"] < 1e-6
        assert max(record["merge_errors"].values()) < 1e-6
        assert len(record["merge_errors"]) == MODULES


def test_the_merge_is_the_mean_of_what_the_clients_do(ran: Ran) -> None:
    """Against a dense reference: each client's B R A from the bytes that it sent, weighed by its examples."""
    paths = [module.path for module in low_rank_modules(ran.initial.spec)]
    squares = {path: np.zeros((3, 3)) for path in paths}
    for exchanged in ran.exchanges:
        products = {path: np.zeros((16, 16)) for path in paths}
        means = {path: np.zeros((3, 3)) for path in paths}
        replies = {partition: reply for partition, (_, reply) in exchanged.items() if isinstance(reply, Packet)}
        total = sum(float(reply.manifest["examples"]) for reply in replies.values())
        for partition, reply in replies.items():
            rank, share = ranks_of(ran)[partition], float(reply.manifest["examples"]) / total
            deltas = dense().decode(reply.body, at_rank(ran.initial.spec, rank).without(("*.A", "*.B")))
            for path in paths:
                a, b = (ran.initial.tensors[f"{path}.{name}"].astype(np.float64) for name in ("A", "B"))
                square = squares[path][:rank, :rank] + deltas[f"{path}.R"]
                products[path] += share * b[:, :rank] @ square @ a[:rank]
                means[path][:rank, :rank] += share * square
        squares = means
    for module in low_rank_modules(ran.final.spec):
        product, wanted = factors(module, ran.final.tensors), products[module.path]
        assert np.linalg.norm(wanted) > 1e-3
        assert np.linalg.norm(product.b @ product.a - wanted) < 1e-6 * np.linalg.norm(wanted)


def test_after_the_first_contact_only_squares_and_the_head_travel(ran: Ran) -> None:
    ranks = ranks_of(ran)
    for number, exchanged in enumerate(ran.exchanges):
        for partition, (request, reply) in exchanged.items():
            rank = ranks[partition]
            factors_too = MODULES * rank * (16 + 16) if number == 0 else 0
            assert len(request.body) == 4 * (numbers(rank) + factors_too)
            assert isinstance(reply, Packet)
            assert len(reply.body) == 4 * numbers(rank)
    first, second, third = (record["bytes_down"] for record in ran.rounds)
    assert first - second == 4 * MODULES * sum(ranks) * (16 + 16)
    assert second == third


# peft asks each model for a property that transformers has renamed.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_what_is_deployed_is_what_was_trained(ran: Ran, tiny_model: Path, tmp_path: Path) -> None:
    root, adapted = Path(ran.config.out), adapted_model(ran.config)
    install(adapted, ran.final)
    expected = logits(adapted.model)
    loss = evaluator_of(ran.config)(ran.final)["loss"]
    assert loss == pytest.approx(ran.rounds[-1]["evaluation"]["loss"], rel=1e-6)

    def stock(folder: Path) -> Any:
        return transformers.AutoModelForSequenceClassification.from_pretrained(
            str(folder), num_labels=3, dtype=torch.float32, local_files_only=True
        )

    run_export(root, tmp_path / "adapter", merged=False)
    run_export(root, tmp_path / "merged", merged=True)
    for folder in (tmp_path / "adapter", root / "adapter"):
        assert torch.equal(logits(peft.PeftModel.from_pretrained(stock(tiny_model), str(folder))), expected)
    assert torch.allclose(logits(stock(tmp_path / "merged")), expected, atol=1e-5, rtol=1e-5)


def test_nothing_but_the_square_trains_whatever_the_merge_freezes(config: Callable[..., RunConfig]) -> None:
    """A job that freezes nothing, twice, with weight decay: the factors are the same bytes, and the squares are not."""
    made = config(training={"steps": 3, "weight_decay": 0.5, "proximal": 0.5, "learning_rate": 0.1})
    learner, initial = learner_of(made, site_examples(made, 0)), adapted_model(made).initial
    for frozen in ((), tuple(key for key in initial.tensors if key.endswith((".A", ".B"))), ()):
        fitted = learner.fit(initial, FitJob(round=1, partition=0, frozen=frozen, position=0))
        for key, value in fitted.after.items():
            assert (value.tobytes() == initial.tensors[key].tobytes()) == key.endswith((".A", ".B")), key


def test_the_squares_learn(config: Callable[..., RunConfig]) -> None:
    """The head frozen, so that whatever the loss falls by is the squares' doing."""
    made = config(
        rounds=4,
        adapter={"family": "lora_sb", "lora_sb": {"rank": 8, "alpha": 8.0, "target_modules": ["query", "dense"]}},
        aggregation={"merge": {"rule": "fed_sb"}, "stages": {"frozen": ["classifier.*"]}},
        training={"steps": 10, "batch_size": 8, "learning_rate": 0.05},
    )
    before = evaluator_of(made)(adapted_model(made).initial)["loss"]
    assert run(made).rounds[-1]["evaluation"]["loss"] < 0.8 * before


def test_bounds_are_measured(config: Callable[..., RunConfig]) -> None:
    made = config()
    rows = measure_bounds(made, BOUNDS, lambda name: None)
    assert [row["name"] for row in rows] == [bound.name for bound in BOUNDS]
    assert all(np.isfinite(row["evaluation"]["loss"]) for row in rows)


def _without(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without(item) for key, item in value.items() if "seconds" not in key and key != "time"}
    return [_without(item) for item in value] if isinstance(value, list) else value


def timeless(records: list[dict[str, Any]]) -> str:
    """The rounds of a journal less what a clock says."""
    return json.dumps([_without(record) for record in records if record["event"] == "round"])


@pytest.mark.parametrize("ranks", RANKS)
def test_resumed_is_never_stopped(config: Callable[..., RunConfig], ranks: tuple[int, ...]) -> None:
    """Stopped after the first round and in the middle of the second, when nodes already hold their factors."""
    changes = {"federation": listed(*ranks, **{"cohort": 2}), "rounds": 4}
    whole = config("whole", **changes)
    expected = run(whole).final
    parts = config("parts", **changes)
    left = [1]

    def after_a_round(record: dict[str, Any]) -> None:
        raise Killed

    def at_a_reply(number: int, partition: int, usable: bool) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise Killed

    folder = folder_for(parts)
    with pytest.raises(Killed):
        federate(
            parts,
            folder,
            tiny.transport(parts, folder),
            engine="local",
            watcher=replace(silent(), round=after_a_round),
        )
    watchers: tuple[Watcher, ...] = (replace(silent(), reply=at_a_reply), silent())
    for watcher in watchers:
        folder, again = reopen(Path(parts.out), [])
        try:
            federate(again, folder, tiny.transport(again, folder), engine="local", resume=True, watcher=watcher)
        except Killed:
            continue
    found = checkpoint.load(Path(parts.out) / "checkpoint").adapter
    assert {key: value.tobytes() for key, value in found.tensors.items()} == {
        key: value.tobytes() for key, value in expected.tensors.items()
    }
    both = [timeless(journal.read(Path(one.out) / "journal.jsonl")) for one in (whole, parts)]
    assert both[0] == both[1]
