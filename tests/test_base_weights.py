from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedpeft import journal, models
from fedpeft.base_weights import held_bytes
from fedpeft.commands.plan import needs, run_plan
from fedpeft.config import digest
from fedpeft.config.adapters import Lora
from fedpeft.config.adapters.prompts import PrefixTuning
from fedpeft.engines.local import LocalTransport
from fedpeft.errors import ModelError
from fedpeft.experiment import site_of
from fedpeft.federate import federate
from fedpeft.memory import FolderMemory
from fedpeft.runs import RunFolder
from tests import tiny
from tests.tiny import moved

FORMATS = ("float32", "bfloat16", "nf4", "int8")


def loss(adapted: models.AdaptedModel) -> torch.Tensor:
    adapted.model.train()
    kind = adapted.precision if adapted.precision != torch.float32 else None
    with torch.autocast("cpu", dtype=kind, enabled=kind is not None):
        output = adapted.model(**tiny.batch()).logits.float()
    return torch.nn.functional.cross_entropy(output, torch.tensor([0, 1, 2]))


@pytest.mark.parametrize("weights", FORMATS)
def test_an_adapter_in_float32_trains_on_a_base_in_any_format(tiny_model: Path, weights: str) -> None:
    adapted = tiny.load(tiny_model, Lora(rank=2), weights=weights)
    models.install(adapted, moved(adapted.initial))
    before = {name: p.detach().clone() for name, p in adapted.model.named_parameters() if not p.requires_grad}
    trained = models.trained(adapted)
    assert {parameter.dtype for parameter in trained.values()} == {torch.float32}
    optimizer = torch.optim.SGD(trained.values(), lr=0.3)
    found = []
    for _ in range(4):
        optimizer.zero_grad()
        value = loss(adapted)
        torch.autograd.backward(value)
        assert all(parameter.grad is not None for parameter in trained.values())
        optimizer.step()
        found.append(float(value.detach()))
    assert found[-1] < found[0]
    after = dict(adapted.model.named_parameters())
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_a_base_is_the_same_in_every_format_and_takes_less(tiny_model: Path) -> None:
    loaded = {weights: tiny.load(tiny_model, weights=weights) for weights in FORMATS}
    assert len({adapted.spec.digest for adapted in loaded.values()}) == 1
    assert len({adapted.base_parameters for adapted in loaded.values()}) == 1
    sizes = {weights: held_bytes(adapted.model) for weights, adapted in loaded.items()}
    assert sizes["bfloat16"] < 0.55 * sizes["float32"]
    assert sizes["nf4"] < sizes["int8"] < sizes["float32"]


def test_another_base_of_the_same_shape_is_told_apart(tiny_model: Path, tmp_path: Path) -> None:
    other = tiny.build(tmp_path / "other", seed=1)
    one, two = tiny.load(tiny_model, weights="nf4"), tiny.load(other, weights="nf4")
    assert one.spec.base_model != two.spec.base_model


@pytest.mark.parametrize("weights", ["float32", "nf4"])
def test_layers_that_are_computed_again_give_the_same_gradients(
    tiny_model: Path, weights: str, one_thread: None
) -> None:
    found = []
    for again in (False, True):
        adapted = tiny.load(tiny_model, weights=weights, gradient_checkpointing=again)
        models.install(adapted, moved(adapted.initial))
        torch.autograd.backward(loss(adapted))
        found.append({key: p.grad.clone() for key, p in models.trained(adapted).items() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for key, gradient in found[0].items():
        torch.testing.assert_close(found[1][key], gradient, rtol=1e-5, atol=1e-7)


def test_a_prefix_beside_layers_that_are_computed_again_is_one_sentence(tiny_model: Path) -> None:
    with pytest.raises(ModelError, match=r"adapter\.prefix_tuning: .* found model\.gradient_checkpointing=true"):
        tiny.load(tiny_model, PrefixTuning(virtual_tokens=2), gradient_checkpointing=True)


def test_a_format_without_its_library_is_one_sentence(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find(name))
    with pytest.raises(ModelError, match=r"model\.weights: expected the library bitsandbytes.*fedpeft\[quantised\]"):
        tiny.load(tiny_model, weights="nf4")


def test_nodes_that_hold_the_base_in_their_own_way_learn_together(
    tiny_model: Path, tiny_rows: Path, tmp_path: Path
) -> None:
    config = tiny.run_config(tiny_model, tiny_rows, tmp_path / "run", federation={"clients": 3, "cohort": 3})
    ways = ("float32", "nf4", "bfloat16")

    def site(partition: int) -> Any:
        local = replace(config, model=replace(config.model, weights=ways[partition]))
        return replace(site_of(local, partition), config=digest(config))

    folder = RunFolder(tmp_path / "run")
    records = federate(config, folder, LocalTransport(3, site, FolderMemory(folder.memories)), engine="local")
    rounds = [record for record in records if record["event"] == "round"]
    assert all(not record["failures"] for record in rounds)
    assert [len(record["clients"]) for record in rounds] == [3] * 4
    assert rounds[-1]["evaluation"]["loss"] < rounds[0]["evaluation"]["loss"]
    assert journal.read(folder.journal)[-1]["event"] == "end"


def test_a_plan_says_what_fits(tiny_model: Path, tiny_run: str, tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "run.toml"
    path.write_text(tiny_run)
    run_plan(path, [], 100.0)
    assert "As set it fits" in capsys.readouterr().out
    run_plan(path, [], 1e-3)
    told = capsys.readouterr().out
    assert "does not fit" in told
    assert "Nothing here fits" in told


def test_a_plan_names_the_first_way_that_fits(
    tiny_model: Path, tiny_rows: Path, tiny_run: str, tmp_path: Path, capsys: Any
) -> None:
    config = tiny.run_config(tiny_model, tiny_rows, tmp_path / "out")
    found = {(need.weights, need.checkpointing): need for need in needs(config)}
    assert not any(need.refused for need in found.values())
    own, less = found["float32", False], found["float32", True]
    assert less.training < own.training
    path = tmp_path / "run.toml"
    path.write_text(tiny_run)
    run_plan(path, [], (less.total + 1) / 1e9)
    assert "set model.weights=float32 model.gradient_checkpointing=true" in capsys.readouterr().out
