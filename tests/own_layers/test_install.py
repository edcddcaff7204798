"""Where a method goes, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import nn

from fedpeft.errors import ModelError
from fedpeft.own_layers import OWN, install, trainable
from tests import tiny_models
from tests.own_layers.test_methods import bare, values


class Unknown(nn.Module):
    """A network of two linear layers that no table knows."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 4)
        self.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x).relu())


def wrapped(model: Any, method: str) -> set[str]:
    ending = f".fedpeft_{method}"
    return {name.removesuffix(ending) for name, _ in model.named_modules() if name.endswith(ending)}


@pytest.mark.parametrize(
    ("kind", "method", "places"),
    [
        ("bert", "houlsby", {"bert.encoder.layer.1.attention.output.dense", "bert.encoder.layer.1.output.dense"}),
        ("bert", "pfeiffer", {"bert.encoder.layer.1.output.LayerNorm"}),
        ("bert", "parallel", {"bert.encoder.layer.1.output"}),
        ("roberta", "parallel", {"roberta.encoder.layer.1.output"}),
        (
            "distilbert",
            "houlsby",
            {f"distilbert.transformer.layer.1.{one}" for one in ("attention.out_lin", "ffn.lin2")},
        ),
        ("distilbert", "pfeiffer", {"distilbert.transformer.layer.1.output_layer_norm"}),
        ("distilbert", "parallel", {"distilbert.transformer.layer.1.ffn"}),
        ("llama", "houlsby", {"model.layers.1.self_attn.o_proj", "model.layers.1.mlp.down_proj"}),
        ("llama", "pfeiffer", {"model.layers.1.mlp.down_proj"}),
        ("llama", "parallel", {"model.layers.1.mlp"}),
        ("gpt2", "houlsby", {"transformer.h.1.attn.c_proj", "transformer.h.1.mlp.c_proj"}),
        ("vit", "houlsby", {"vit.layers.1.attention.o_proj", "vit.layers.1.mlp.fc2"}),
        ("dinov2", "parallel", {"encoder.layer.1.mlp"}),
        (
            "t5",
            "houlsby",
            {
                "encoder.block.1.layer.0.SelfAttention.o",
                "encoder.block.1.layer.1.DenseReluDense.wo",
                "decoder.block.1.layer.0.SelfAttention.o",
                "decoder.block.1.layer.1.EncDecAttention.o",
                "decoder.block.1.layer.2.DenseReluDense.wo",
            },
        ),
    ],
)
def test_a_method_goes_where_its_paper_puts_it(kind: str, method: str, places: set[str]) -> None:
    last, all_of_them = bare(kind), bare(kind)
    install(last, method, {"layers": [1]})
    install(all_of_them, method, {})
    assert wrapped(last, method) == places
    first = {path.replace(".1.", ".0.", 1) for path in places}
    assert wrapped(all_of_them, method) == places | first


def test_parameters_by_hand() -> None:
    counts = {
        method: sum(parameter.numel() for parameter in trainable(model).values())
        for method in OWN
        if method != "visual_prompt" and not OWN[method].masks
        if install(model := bare("bert"), method, {}) is None
    }
    # Per layer: query, key, value, attention's output 16 each, its norm 16, feed-forward 24 and 16, its norm 16;
    # besides them the embeddings' norm and the pooler.
    assert counts["bitfit"] == 2 * (4 * 16 + 16 + 24 + 16 + 16) + 16 + 16
    assert counts["layer_norm"] == 2 * 2 * 32 + 32
    assert counts["ssf"] == 2 * counts["bitfit"]
    # One hidden unit, a sixteenth of 16.
    assert counts["houlsby"] == 2 * counts["pfeiffer"] == 2 * counts["parallel"] == 4 * (16 + 1 + 16 + 16)


@pytest.mark.parametrize(
    ("settings", "hidden"), [({"bottleneck": 5}, 5), ({"reduction": 8}, 2), ({"bottleneck": 3, "reduction": 2}, 3)]
)
def test_a_bottleneck_is_given_or_a_share_of_the_width(settings: dict[str, int], hidden: int) -> None:
    model = bare("bert")
    install(model, "houlsby", settings)
    assert {tuple(p.shape) for n, p in trainable(model).items() if n.endswith("down.weight")} == {(hidden, 16)}


def test_the_seed_alone_decides_what_is_drawn() -> None:
    drawn = []
    for seed in (1, 1, 2):
        model = bare("bert")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            install(model, "parallel", {})
        drawn.append(torch.cat([parameter.detach().flatten() for parameter in trainable(model).values()]))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_biases_and_modules_may_be_named() -> None:
    model = bare("bert")
    install(model, "bitfit", {"biases": ["*.query.bias", "*.intermediate.dense.bias"], "layers": [0]})
    layer = "bert.encoder.layer.0"
    assert list(trainable(model)) == [f"{layer}.attention.self.query.bias", f"{layer}.intermediate.dense.bias"]
    install(model, "layer_norm", {"target_modules": ["attention.output"]})
    assert set(trainable(model)) - {f"{layer}.attention.self.query.bias", f"{layer}.intermediate.dense.bias"} == {
        f"bert.encoder.layer.{at}.attention.output.LayerNorm.{name}" for at in (0, 1) for name in ("weight", "bias")
    }


def test_modules_that_are_named_cure_an_unknown_architecture() -> None:
    model, x = Unknown(), torch.randn(3, 4)
    before = model(x)
    for method, target in (("houlsby", "first"), ("parallel", "second"), ("ssf", "second")):
        install(model, method, {"target_modules": [target]})
    assert torch.equal(model(x), before)
    assert wrapped(model, "parallel") == {"second.base_layer"}
    model(x).sum().backward()
    assert all(parameter.grad is not None for parameter in trainable(model).values())


def test_the_head_and_the_output_embeddings_are_not_the_bodys() -> None:
    for kind, head in (("bert", "classifier"), ("t5", "lm_head"), ("llama", "lm_head"), ("vit", "classifier")):
        model = bare(kind)
        install(model, "ssf", {})
        assert not any(name.startswith(head) for name in trainable(model))


def test_a_model_without_a_head_is_a_base_too() -> None:
    model = transformers.BertModel(tiny_models.bert().config)
    model.requires_grad_(False)
    install(model, "parallel", {})
    assert wrapped(model, "parallel") == {"encoder.layer.0.output", "encoder.layer.1.output"}


@pytest.mark.parametrize(
    ("kind", "method", "settings", "words"),
    [
        ("bert", "nothing", {}, r"^adapter: expected one of bitfit, .*, found 'nothing'"),
        ("bert", "houlsby", {"rank": 2}, r"^adapter\.houlsby: expected settings among bottleneck, .*, found 'rank'"),
        ("bert", "bitfit", {"scale": 2.0}, r"^adapter\.bitfit: expected settings among biases, .*, found 'scale'"),
        ("bert", "houlsby", {"bottleneck": -1}, r"bottleneck: expected a whole number, 0 to 65536, found -1"),
        ("bert", "houlsby", {"bottleneck": True}, r"bottleneck: expected a whole number"),
        ("bert", "houlsby", {"reduction": 0}, r"reduction: expected a whole number, 1 to 65536, found 0"),
        ("bert", "parallel", {"scale": float("nan")}, r"scale: expected a number above 0, found nan"),
        ("bert", "parallel", {"scale": "4"}, r"scale: expected a number above 0, found '4'"),
        ("bert", "pfeiffer", {"activation": "tanh"}, r"activation: expected one of relu, gelu, silu, found 'tanh'"),
        ("bert", "ssf", {"target_modules": "query"}, r"target_modules: expected a list of modules' names"),
        ("bert", "ssf", {"target_modules": ["querry"]}, r"expected names of modules that the base has, found 'querry'"),
        ("bert", "houlsby", {"target_modules": ["dropout"]}, r"on bert\.\S+dropout: expected a module with linear lay"),
        ("bert", "parallel", {"layers": [0, 2]}, r"layers: expected some of the layers that it fits, 0 to 1, found 2"),
        ("bert", "bitfit", {"biases": ["*.nothing"]}, r"^adapter\.bitfit: expected a base with biases that the sett"),
        ("llama", "bitfit", {}, r"^adapter\.bitfit: .* found none in LlamaForCausalLM; choose ln_tuning or ssf"),
        (
            "t5",
            "bitfit",
            {},
            r"^adapter\.bitfit: .* found none in T5ForConditionalGeneration; choose ln_tuning or ssf",
        ),
    ],
)
def test_what_does_not_fit_is_one_sentence_and_leaves_the_base(
    kind: str, method: str, settings: dict[str, Any], words: str
) -> None:
    model = bare(kind)
    names = [name for name, _ in model.named_parameters()]
    with pytest.raises(ModelError, match=words) as caught:
        install(model, method, settings)
    assert "\n" not in str(caught.value)
    assert [name for name, _ in model.named_parameters()] == names
    assert not trainable(model)


@pytest.mark.parametrize("method", ["houlsby", "pfeiffer", "parallel"])
def test_an_unknown_architecture_is_refused(method: str) -> None:
    with pytest.raises(
        ModelError, match=r"a base built like BERT, .*, found Unknown; name the modules .* in target_mod"
    ):
        install(Unknown(), method, {})


def test_a_base_without_norms_is_refused() -> None:
    with pytest.raises(ModelError, match=r"expected a base with norms, found none in Unknown; choose ssf"):
        install(Unknown(), "layer_norm", {})


@pytest.mark.parametrize("method", [method for method in OWN if method != "visual_prompt"])
def test_a_method_is_installed_once(method: str) -> None:
    model = bare("bert")
    install(model, method, {})
    with pytest.raises(ModelError, match=r"install it once"):
        install(model, method, {})
    assert torch.equal(values(model, "bert"), values(bare("bert"), "bert"))
