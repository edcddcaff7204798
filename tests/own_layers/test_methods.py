"""What holds for every method on every architecture that it fits."""

from __future__ import annotations

import copy
import functools
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from fedpeft.own_layers import OWN, canonical, install, load, remove, save, switched_off, trainable
from tests import tiny_models
from tests.tiny_models import loss, outputs

pytestmark = pytest.mark.usefixtures("one_thread")

SETTINGS: dict[str, dict[str, Any]] = {
    "bitfit": {},
    "layer_norm": {},
    "houlsby": {"bottleneck": 5},
    "pfeiffer": {"reduction": 4, "activation": "silu"},
    "parallel": {"bottleneck": 6, "scale": 1.5},
    "ssf": {},
}
WITHOUT_BIASES = ("llama", "t5")
# A softmax does not see what is added to all keys alike; with rotated positions it is not added alike.
UNSEEN = re.compile(r"\.(key|k_lin|k_proj|k)\.(bias|fedpeft_ssf\.shift)$")

everywhere = pytest.mark.parametrize(
    ("kind", "method"),
    [
        (kind, method)
        for kind in tiny_models.MODELS
        for method in SETTINGS
        if not (method == "bitfit" and kind in WITHOUT_BIASES)
    ],
)


@functools.cache
def _pattern(kind: str) -> Any:
    model = tiny_models.MODELS[kind]()
    model.requires_grad_(False)
    return model


def bare(kind: str) -> Any:
    """A frozen model of this kind, always the same."""
    return copy.deepcopy(_pattern(kind))


def adapted(kind: str, method: str, seed: int = 0) -> Any:
    model = bare(kind)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        install(model, method, SETTINGS[method])
    return model


def trained(model: Any, kind: str, steps: int = 2) -> Any:
    optimizer = torch.optim.Adam(trainable(model).values(), lr=0.03)
    for step in range(steps):
        optimizer.zero_grad()
        loss(model, kind, step).backward()
        optimizer.step()
    return model


def values(model: Any, kind: str) -> torch.Tensor:
    with torch.no_grad():
        return outputs(model, kind, 9)


def bits(model: Any) -> dict[str, torch.Tensor]:
    """The base's parameters, by their names in the base."""
    named = ((canonical(name), value) for name, value in model.named_parameters())
    return {name: value.detach().clone() for name, value in named if "fedpeft_" not in name}


@everywhere
def test_a_fresh_adapter_changes_no_bit(kind: str, method: str) -> None:
    assert torch.equal(values(adapted(kind, method), kind), values(bare(kind), kind))


@everywhere
def test_the_own_parameters_alone_require_gradients_and_each_gets_one(kind: str, method: str) -> None:
    model = adapted(kind, method)
    own = trainable(model)
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == list(own)
    if OWN[method].adds_layers:
        tensors = {re.split(rf"\.fedpeft_{method}\.", name)[1] for name in own}
        assert tensors == set(OWN[method].tensors)
    # The first step moves up and the second what is behind it.
    trained(model, kind)
    for name, parameter in own.items():
        assert parameter.grad is not None, name
        if kind == "llama" or not UNSEEN.search(name):
            assert parameter.grad.abs().max() > 1e-7, name


@everywhere
def test_training_moves_the_own_parameters_and_nothing_of_the_base(kind: str, method: str) -> None:
    model = adapted(kind, method)
    own = {canonical(name) for name in trainable(model)}
    before = bits(model)
    trained(model, kind)
    after = bits(model)
    moved = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert moved <= own
    assert not torch.equal(values(model, kind), values(bare(kind), kind))
    assert before.keys() == bits(bare(kind)).keys()


@everywhere
def test_tensors_travel_to_a_model_made_under_another_seed(kind: str, method: str) -> None:
    one, other = trained(adapted(kind, method, seed=1), kind), adapted(kind, method, seed=2)
    mine, theirs = trainable(one), trainable(other)
    assert list(mine) == list(theirs)
    assert not torch.equal(values(one, kind), values(other, kind))
    with torch.no_grad():
        for name, parameter in theirs.items():
            parameter.copy_(mine[name])
    assert torch.equal(values(one, kind), values(other, kind))


@everywhere
def test_switched_off_is_the_bare_base_and_afterwards_all_is_back(kind: str, method: str) -> None:
    model, base = trained(adapted(kind, method), kind), values(bare(kind), kind)
    with_adapter = values(model, kind)
    with switched_off(model):
        assert torch.equal(values(model, kind), base)
    assert torch.equal(values(model, kind), with_adapter)
    remove(model)
    assert torch.equal(values(model, kind), base)
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in bare(kind).named_parameters()]
    assert not trainable(model)
    assert not any(parameter.requires_grad for parameter in model.parameters())


@everywhere
def test_a_deep_copy_stands_alone(kind: str, method: str) -> None:
    model = trained(adapted(kind, method), kind)
    before = values(model, kind)
    twin = copy.deepcopy(model)
    assert torch.equal(values(twin, kind), before)
    trained(twin, kind, steps=1)
    assert not torch.equal(values(twin, kind), before)
    with switched_off(twin):
        assert torch.equal(values(twin, kind), values(bare(kind), kind))
        assert torch.equal(values(model, kind), before)


@everywhere
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(kind: str, method: str, reentrant: bool) -> None:
    model = trained(adapted(kind, method), kind).train()
    pictures, found = kind in ("vit", "dinov2"), []
    for again in (False, True):
        if again:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
            embeddings = getattr(model, "vit", model).embeddings if pictures else model.get_input_embeddings()
            embeddings.register_forward_hook(lambda _m, _i, output: output.requires_grad_())
        model.zero_grad()
        loss(model, kind, 4).backward()
        found.append({name: parameter.grad for name, parameter in trainable(model).items()})
    assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    for name, gradient in found[0].items():
        assert torch.allclose(gradient, found[1][name], rtol=1e-5, atol=1e-7), name


@everywhere
def test_training_mode_computes_what_evaluation_does(kind: str, method: str) -> None:
    model = trained(adapted(kind, method), kind)
    before = values(model.eval(), kind)
    assert torch.equal(values(model.train(), kind), before)


@everywhere
def test_a_folder_brings_the_adapter_back(tmp_path: Path, kind: str, method: str) -> None:
    model = trained(adapted(kind, method), kind)
    installed = [(method, SETTINGS[method])]
    save(model, tmp_path, installed)
    again = bare(kind)
    stands = torch.get_rng_state()
    assert load(again, tmp_path) == installed
    assert torch.equal(torch.get_rng_state(), stands)
    assert torch.equal(values(again, kind), values(model, kind))
    with switched_off(again):
        assert torch.equal(values(again, kind), values(bare(kind), kind))
