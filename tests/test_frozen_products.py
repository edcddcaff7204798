from __future__ import annotations

import pytest
import torch
from torch import nn

from fedpeft.frozen_products import by_onednn


def layers(dtype: torch.dtype = torch.float32, bias: bool = True) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 5, bias=bias), nn.Tanh(), nn.Linear(5, 4, bias=bias)).to(dtype)


def names(function: object) -> set[str]:
    """The kinds of step that gradients go back through from here."""
    following = [step for step, _ in getattr(function, "next_functions", ()) if step is not None]
    return {type(function).__name__}.union(*map(names, following))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(6,), (3, 6), (2, 3, 6), (2, 2, 3, 6), (0, 6)])
def test_frozen_layers_give_what_they_gave_forward_and_backward(shape: tuple[int, ...], bias: bool) -> None:
    model = layers(bias=bias).requires_grad_(False)
    given = torch.randn(shape, requires_grad=True)
    plain = model(given)
    (slope,) = torch.autograd.grad(plain.square().sum(), given)
    with by_onednn(model, ()):
        made = model(given)
        assert ("_ProductBackward" in names(made.grad_fn)) == (len(shape) > 1 and 0 not in shape)
        (found,) = torch.autograd.grad(made.square().sum(), given)
    assert torch.allclose(made, plain, atol=1e-6)
    assert torch.allclose(found, slope, atol=1e-6)
    assert "_ProductBackward" not in names(model(given).grad_fn)


def test_what_a_frozen_layer_gives_may_be_added_to_in_place() -> None:
    model = layers().requires_grad_(False)[0]
    added = torch.ones(2, 3, 5, requires_grad=True)
    with by_onednn(model, ()):
        made = model(torch.randn(2, 3, 6))
        made += added
    assert torch.equal(torch.autograd.grad(made.sum(), added)[0], torch.ones(2, 3, 5))


def test_layers_that_learn_or_that_clients_have_of_their_own_keep_their_own_gradients() -> None:
    model = layers()
    model[2].requires_grad_(False)
    given = torch.randn(3, 6)
    with by_onednn(model, {id(model[2].weight)}):
        made = model(given)
    assert "_ProductBackward" not in names(made.grad_fn)
    assert torch.autograd.grad(made.sum(), model[0].weight)[0].abs().sum() > 0


def test_other_precisions_compute_as_ever() -> None:
    model, given = layers(torch.bfloat16).requires_grad_(False), torch.randn(3, 6, requires_grad=True)
    with by_onednn(model, ()):
        assert "_ProductBackward" not in names(model(given.bfloat16()).grad_fn)
    model = layers().requires_grad_(False)
    with by_onednn(model, ()), torch.autocast("cpu", torch.bfloat16):
        assert model(given).dtype == torch.bfloat16
