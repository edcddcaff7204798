from __future__ import annotations

from typing import Any

import pytest
import torch

from fedpeft.own_layers import disabled, install, switched_off, trainable
from tests.own_layers.test_layers import stirred
from tests.own_layers.test_methods import bare, trained, values

pytestmark = pytest.mark.usefixtures("one_thread")


def both() -> Any:
    """A BERT with a method that adds and one that trains what is there."""
    model = stirred("bert", "parallel", {"bottleneck": 3})
    install(model, "bitfit", {})
    return trained(model, "bert")


def test_blocks_nest() -> None:
    model = both()
    base, on = values(bare("bert"), "bert"), values(model, "bert")
    with switched_off(model):
        with switched_off(model), disabled(model):
            assert torch.equal(values(model, "bert"), base)
        assert torch.equal(values(model, "bert"), base)
        with switched_off(model.bert.encoder.layer[0]):
            pass
        assert torch.equal(values(model, "bert"), base)
    assert torch.equal(values(model, "bert"), on)


def test_an_exception_inside_brings_the_adapter_back() -> None:
    model = both()
    on = values(model, "bert")
    with pytest.raises(KeyError), switched_off(model):
        raise KeyError
    assert torch.equal(values(model, "bert"), on)


def test_only_a_part_may_be_switched_off() -> None:
    model = both()
    base, on = values(bare("bert"), "bert"), values(model, "bert")
    with switched_off(model.bert.encoder.layer[1]):
        part = values(model, "bert")
    assert not torch.equal(part, on)
    assert not torch.equal(part, base)


def test_gradients_and_identities_outlive_a_block() -> None:
    model = both()
    own = trainable(model)
    optimizer = torch.optim.SGD(own.values(), lr=0.1)
    optimizer.zero_grad()
    model(**{"input_ids": torch.tensor([[3, 4, 5]])}).logits.sum().backward()
    gradients = {name: parameter.grad.clone() for name, parameter in own.items() if parameter.grad is not None}
    with switched_off(model):
        values(model, "bert")
    before = {name: parameter.detach().clone() for name, parameter in own.items()}
    optimizer.step()
    assert all(trainable(model)[name] is parameter for name, parameter in own.items())
    for name, gradient in gradients.items():
        assert torch.allclose(own[name], before[name] - 0.1 * gradient, atol=1e-7), name


def test_a_forward_pass_before_a_block_and_a_backward_pass_after_it_agree() -> None:
    model = both()
    gradients = []
    for between in (False, True):
        model.zero_grad()
        total = model(**{"input_ids": torch.tensor([[3, 4, 5]])}).logits.square().sum()
        if between:
            with switched_off(model):
                values(model, "bert")
        total.backward()
        gradients.append([parameter.grad.clone() for parameter in trainable(model).values()])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_what_is_kept_is_in_no_state_dictionary() -> None:
    model = bare("bert")
    before = set(model.state_dict())
    install(model, "bitfit", {})
    assert set(model.state_dict()) == before
