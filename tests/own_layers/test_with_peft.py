"""Methods under an adapter of peft's on the same base."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from fedpeft.errors import ModelError
from fedpeft.own_layers import (
    base_of,
    canonical,
    disabled,
    install,
    load,
    merge,
    retrain,
    save,
    switched_off,
    trainable,
)
from tests import tiny_models
from tests.own_layers.test_methods import values
from tests.tiny_models import loss

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
]

TASKS = {"bert": "SEQ_CLS", "llama": "CAUSAL_LM"}
QUERIES = {"bert": ["query", "value"], "llama": ["q_proj", "v_proj"]}
PEFT = {
    "prefix": lambda kind: peft.PrefixTuningConfig(task_type=TASKS[kind], num_virtual_tokens=3),
    "lora": lambda kind: peft.LoraConfig(task_type=TASKS[kind], r=2, target_modules=QUERIES[kind]),
}

pairs = pytest.mark.parametrize(
    ("kind", "method", "adapter"),
    [
        (kind, method, adapter)
        for kind in TASKS
        for method, adapter in (("parallel", "prefix"), ("bitfit", "lora"), ("houlsby", "lora"), ("ssf", "prefix"))
    ],
)


def base(kind: str) -> Any:
    model = tiny_models.llama(biases=True) if kind == "llama" else tiny_models.bert()
    model.requires_grad_(False)
    return model


def joined(kind: str, method: str, adapter: str, seed: int = 0) -> Any:
    model = base(kind)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        install(model, method, {})
        return peft.get_peft_model(model, PEFT[adapter](kind))


def trained(model: Any, kind: str) -> Any:
    """Two steps of all that requires gradients but the head's copy, so that without adapters the base is left."""
    retrain(model)
    learning = {n: p for n, p in model.named_parameters() if p.requires_grad and "modules_to_save" not in n}
    optimizer = torch.optim.Adam(learning.values(), lr=0.03)
    for step in range(2):
        optimizer.zero_grad()
        loss(model, kind, step).backward()
        optimizer.step()
    return model


@pairs
def test_both_learn_and_the_base_stays(kind: str, method: str, adapter: str) -> None:
    model = joined(kind, method, adapter)
    theirs = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    own = trainable(model)
    assert own
    assert not theirs & own.keys()
    retrain(model)
    required = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert required == theirs | own.keys()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trained(model, kind)
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved <= required
    assert moved & own.keys()
    assert moved & theirs


@pairs
def test_each_may_be_left_out(kind: str, method: str, adapter: str) -> None:
    model = trained(joined(kind, method, adapter), kind)
    bare, on = values(base(kind), kind), values(model, kind)
    with switched_off(model):
        without_ours = values(model, kind)
    assert not torch.equal(without_ours, bare)
    assert not torch.equal(without_ours, on)
    required = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    for _ in range(2):
        with disabled(model):
            with disabled(model):
                assert torch.equal(values(model, kind), bare)
            assert torch.equal(values(model, kind), bare)
        assert torch.equal(values(model, kind), on)
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == required
    with pytest.raises(KeyError), disabled(model):
        raise KeyError
    assert torch.equal(values(model, kind), on)


@pairs
def test_tensors_and_folders_travel(tmp_path: Path, kind: str, method: str, adapter: str) -> None:
    model, other = trained(joined(kind, method, adapter), kind), joined(kind, method, adapter, seed=5)
    learned = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            parameter.copy_(learned[name])
    assert torch.equal(values(other, kind), values(model, kind))
    save(model, tmp_path, [(method, {})])
    alone = base(kind)
    load(alone, tmp_path)
    mine = {canonical(name): value for name, value in trainable(base_of(model)).items()}
    loaded = {canonical(name): value for name, value in trainable(alone).items()}
    assert mine.keys() == loaded.keys()
    assert all(torch.equal(value, mine[name]) for name, value in loaded.items())


@pytest.mark.parametrize("kind", TASKS)
@pytest.mark.parametrize("method", ["bitfit", "houlsby", "parallel"])
def test_when_peft_merges_its_own_ours_stays(kind: str, method: str) -> None:
    model = trained(joined(kind, method, "lora"), kind)
    before, own = values(model, kind), {canonical(name) for name in trainable(base_of(model))}
    merged = copy.deepcopy(model).merge_and_unload()
    assert not isinstance(merged, peft.PeftModel)
    assert torch.allclose(values(merged, kind), before, atol=2e-5)
    assert {canonical(name) for name in trainable(merged)} == own
    assert torch.equal(values(model, kind), before)
    with switched_off(merged):
        assert not torch.allclose(values(merged, kind), before, atol=1e-3)


def test_a_lora_on_all_linear_layers_leaves_ours_alone() -> None:
    model = base("llama")
    install(model, "houlsby", {})
    before = {canonical(name) for name in trainable(model)}
    wrapped = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear"))
    assert {canonical(name) for name in trainable(base_of(wrapped))} == before
    assert not any("lora_" in name for name in trainable(wrapped))
    trained(wrapped, "llama")
    with disabled(wrapped):
        assert torch.equal(values(wrapped, "llama"), values(base("llama"), "llama"))


@pytest.mark.parametrize("adapter", PEFT)
def test_ours_merges_under_an_adapter_of_peft(adapter: str) -> None:
    model = tiny_models.llama()
    model.requires_grad_(False)
    install(model, "ssf", {"target_modules": ["k_proj", "o_proj", "up_proj"]})
    wrapped = trained(peft.get_peft_model(model, PEFT[adapter]("llama")), "llama")
    before = values(wrapped, "llama")
    merge(wrapped)
    assert torch.allclose(values(wrapped, "llama"), before, atol=2e-5)
    biases = {name.rpartition(".")[0] for name, _ in base_of(wrapped).named_parameters() if name.endswith("bias")}
    assert len(biases) == 2 * 7
    install(base_of(wrapped), "parallel", {"layers": [1]})
    with pytest.raises(ModelError, match=r"^adapter\.parallel on model\.layers\.1\.mlp: expected a method that can be"):
        merge(wrapped)
