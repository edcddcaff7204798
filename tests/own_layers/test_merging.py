from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from fedpeft.errors import ModelError
from fedpeft.own_layers import install, merge, trainable
from tests import tiny_models
from tests.own_layers.test_layers import stirred
from tests.own_layers.test_methods import adapted, bare, trained, values

pytestmark = pytest.mark.usefixtures("one_thread")


def names(model: Any) -> list[str]:
    return [name for name, _ in model.named_parameters()]


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        (kind, method)
        for kind in tiny_models.MODELS
        for method in ("ssf", "layer_norm", "bitfit")
        if kind != "t5" and (kind, method) != ("llama", "bitfit")
    ],
)
def test_a_merged_model_computes_the_same_as_a_stock_one(tmp_path: Path, kind: str, method: str) -> None:
    model = trained(adapted(kind, method), kind)
    before = values(model, kind)
    merge(model)
    assert not trainable(model)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert torch.allclose(values(model, kind), before, atol=2e-5)
    assert not torch.allclose(values(bare(kind), kind), before, atol=1e-3)
    assert names(model) == names(type(model)(model.config))
    model.save_pretrained(tmp_path)
    stock = type(model).from_pretrained(tmp_path, local_files_only=True).eval()
    assert torch.equal(values(stock, kind), values(model, kind))


def test_ssf_and_norms_and_biases_merge_together() -> None:
    model = bare("vit")
    for method in ("ssf", "layer_norm", "bitfit"):
        install(model, method, {})
    trained(model, "vit")
    before = values(model, "vit")
    merge(model)
    assert torch.allclose(values(model, "vit"), before, atol=2e-5)
    assert names(model) == names(bare("vit"))


@pytest.mark.parametrize("method", ["houlsby", "pfeiffer", "parallel"])
def test_a_bottleneck_cannot_be_merged_and_the_model_is_left_as_it_was(method: str) -> None:
    model = stirred("bert", "ssf", {"target_modules": ["query"]})
    install(model, method, {})
    before, state = values(model, "bert"), copy.deepcopy(model.state_dict())
    with pytest.raises(
        ModelError, match=rf"^adapter\.{method} on bert\.encoder\.layer\.0\.\S+: expected a method that"
    ):
        merge(model)
    assert torch.equal(values(model, "bert"), before)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_a_shift_that_no_bias_can_take_up_is_one_sentence() -> None:
    model = trained(adapted("t5", "ssf"), "t5")
    before = values(model, "t5")
    with pytest.raises(ModelError, match=r"SelfAttention\.q: expected a bias that the shift can be merged into, found"):
        merge(model)
    assert torch.equal(values(model, "t5"), before)
    for name, parameter in trainable(model).items():
        if name.endswith("shift"):
            parameter.data.zero_()
    before = values(model, "t5")
    merge(model)
    assert torch.allclose(values(model, "t5"), before, atol=2e-5)


def test_only_the_biases_that_are_needed_are_added() -> None:
    model = stirred("llama", "ssf", {"target_modules": ["q_proj", "v_proj"], "layers": [1]})
    before = values(model, "llama")
    merge(model)
    assert torch.allclose(values(model, "llama"), before, atol=2e-5)
    assert (model.config.attention_bias, model.config.mlp_bias) == (True, False)
    assert names(model) == names(transformers.LlamaForCausalLM(model.config))
