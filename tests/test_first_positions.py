from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from fedpeft.first_positions import _LAYERS, first_alone

SIZES = {
    "vocab_size": 30,
    "hidden_size": 8,
    "embedding_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "max_position_embeddings": 20,
    "pad_token_id": 0,
}


def made(kind: str) -> Any:
    torch.manual_seed(2)
    settings = getattr(transformers, kind.replace("ForSequenceClassification", "Config"))(**SIZES)
    return getattr(transformers, kind)(settings).eval()


@pytest.mark.parametrize("kind", [*_LAYERS, "DistilBertForSequenceClassification"])
def test_a_classifier_says_and_learns_the_same_from_the_first_position_of_its_last_layer(kind: str) -> None:
    model, ids = made(kind), torch.randint(1, 30, (3, 6))
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2, [1] * 2 + [0] * 4])
    widths: list[int] = []
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and module.out_features == SIZES["intermediate_size"]:
            module.register_forward_hook(lambda _, __, answer: widths.append(answer.shape[1]))

    def told() -> list[torch.Tensor]:
        logits = model(input_ids=ids, attention_mask=mask).logits
        used = [one for one in model.parameters() if one.requires_grad]
        slopes = torch.autograd.grad(logits.square().sum(), used, allow_unused=True)
        return [logits, *(slope for slope in slopes if slope is not None)]

    plain = told()
    with first_alone(model):
        found = told()
    again = told()
    if kind in _LAYERS:
        assert widths == [6, 6, 6, 1, 6, 6]
    for one, other, back in zip(plain, found, again, strict=True):
        assert torch.allclose(one, other, atol=1e-6)
        assert torch.equal(one, back)


def test_a_model_that_reads_every_position_is_left_as_it_is() -> None:
    model, ids = made("BertForSequenceClassification").bert, torch.randint(1, 30, (2, 5))
    with first_alone(model):
        assert model(input_ids=ids).last_hidden_state.shape[1] == ids.shape[1]
