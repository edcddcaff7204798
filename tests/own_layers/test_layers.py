"""Each layer against its formula, written out, on the base's own modules."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import gelu, relu

from fedpeft.errors import ModelError
from fedpeft.own_layers import install, switched_off, trainable
from tests import tiny_models
from tests.own_layers.test_methods import bare, loss, values

pytestmark = pytest.mark.usefixtures("one_thread")

X = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(7))


def stirred(kind: str, method: str, settings: dict[str, Any]) -> Any:
    """A base with an adapter whose every number is random."""
    model = bare(kind)
    install(model, method, settings)
    random = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.copy_(torch.randn(parameter.shape, generator=random))
    return model


def bottleneck(own: Any, x: torch.Tensor, scale: float, activation: Any) -> torch.Tensor:
    hidden = activation(x @ own.down.weight.T + own.down.bias)
    return scale * (hidden @ own.up.weight.T + own.up.bias)


def test_houlsby_on_bert_adapts_what_each_sub_layer_adds() -> None:
    layer = stirred("bert", "houlsby", {"bottleneck": 5, "scale": 0.7}).bert.encoder.layer[1]
    for output, wide in ((layer.attention.output, X), (layer.output, torch.cat([X, X[..., :8]], -1))):
        h = output.dense.base_layer(wide)
        adapted = h + bottleneck(output.dense.fedpeft_houlsby, h, 0.7, gelu)
        assert torch.allclose(output(wide, X), output.LayerNorm(adapted + X), atol=1e-6)


def test_pfeiffer_on_bert_reads_after_the_norm_and_adds_before_it() -> None:
    layer = stirred("bert", "pfeiffer", {"bottleneck": 5}).bert.encoder.layer[0]
    norm, hidden = layer.output.LayerNorm.base_layer, layer.intermediate(X)
    z = layer.output.dense(hidden) + X
    expected = norm(z + bottleneck(layer.output.LayerNorm.fedpeft_pfeiffer, norm(z), 1.0, relu))
    assert torch.allclose(layer.feed_forward_chunk(X), expected, atol=1e-6)


def test_parallel_on_bert_reads_the_input_of_the_feed_forward_network_and_adds_to_its_output() -> None:
    layer = stirred("bert", "parallel", {"bottleneck": 5}).bert.encoder.layer[0]
    output = layer.output.base_layer
    ffn = output.dense(layer.intermediate(X))
    expected = output.LayerNorm(ffn + bottleneck(layer.output.fedpeft_parallel, X, 4.0, relu) + X)
    assert torch.allclose(layer.feed_forward_chunk(X), expected, atol=1e-5)


def test_bert_reads_its_feed_forward_network_in_chunks_as_it_does_whole() -> None:
    model = stirred("bert", "parallel", {"bottleneck": 5})
    whole = values(model, "bert")
    for layer in model.bert.encoder.layer:
        layer.chunk_size_feed_forward = 2
    assert torch.allclose(values(model, "bert"), whole, atol=1e-5)


@pytest.mark.parametrize(("kind", "path"), [("llama", "model.layers.1.mlp"), ("vit", "vit.layers.1.mlp")])
def test_parallel_adds_to_the_whole_network(kind: str, path: str) -> None:
    layer = stirred(kind, "parallel", {"bottleneck": 5, "scale": 0.1}).get_submodule(path)
    expected = layer.base_layer(X) + bottleneck(layer.fedpeft_parallel, X, 0.1, relu)
    assert torch.allclose(layer(X), expected, atol=1e-6)


def test_a_module_that_is_named_may_be_attention_or_of_unlike_widths() -> None:
    model = stirred("llama", "parallel", {"bottleneck": 5, "target_modules": ["self_attn", "gate_proj"]})
    gate = model.model.layers[0].mlp.gate_proj
    expected = gate.base_layer(X) + bottleneck(gate.fedpeft_parallel, X, 4.0, relu)
    assert gate(X).shape == (2, 3, 24)
    assert torch.allclose(gate(X), expected, atol=1e-6)
    assert not torch.equal(values(model, "llama"), values(bare("llama"), "llama"))
    with switched_off(model):
        assert torch.equal(values(model, "llama"), values(bare("llama"), "llama"))


def test_ssf_scales_and_shifts_features_of_a_linear_layer_and_channels_of_a_convolution() -> None:
    model = stirred("vit", "ssf", {})
    query, patches = model.vit.layers[0].attention.q_proj, model.vit.embeddings.patch_embeddings.projection
    own = query.fedpeft_ssf
    assert torch.allclose(query(X), own.scale * query.base_layer(X) + own.shift)
    image, own = torch.randn(2, 3, 16, 16), patches.fedpeft_ssf
    expected = own.scale.view(1, 16, 1, 1) * patches.base_layer(image) + own.shift.view(1, 16, 1, 1)
    assert torch.allclose(patches(image), expected)


def test_a_layer_is_called_again_and_again_without_remembering() -> None:
    output = stirred("bert", "parallel", {"bottleneck": 5}).bert.encoder.layer[0].output
    hidden = torch.randn(2, 3, 24)
    first = output(hidden, X)
    output(hidden + 1, 2 * X)
    assert torch.equal(output(hidden, X), first)


def test_a_layer_answers_for_what_it_wraps() -> None:
    wo = stirred("t5", "houlsby", {"bottleneck": 2}).encoder.block[0].layer[1].DenseReluDense.wo
    assert wo.weight is wo.base_layer.weight
    assert wo.out_features == 16
    with pytest.raises(AttributeError, match="nothing"):
        _ = wo.nothing


def test_under_lower_precision_the_output_has_the_precision_that_it_had() -> None:
    for method in ("houlsby", "pfeiffer", "parallel", "ssf"):
        model = stirred("bert", method, {})
        with torch.autocast("cpu", torch.bfloat16):
            wrapped = model.bert.encoder.layer[0].feed_forward_chunk(X)
            with switched_off(model):
                plain = model.bert.encoder.layer[0].feed_forward_chunk(X)
        assert wrapped.dtype == plain.dtype, method
    query = stirred("bert", "ssf", {}).bert.encoder.layer[0].attention.self.query
    with torch.autocast("cpu", torch.bfloat16):
        assert query(X).dtype == query.base_layer(X).dtype == torch.bfloat16
    half = bare("llama").to(torch.bfloat16)
    install(half, "houlsby", {})
    assert {parameter.dtype for parameter in trainable(half).values()} == {torch.float32}
    assert values(half, "llama").dtype == torch.bfloat16


def test_methods_stand_beside_each_other() -> None:
    model = bare("bert")
    for method in ("houlsby", "ssf", "parallel", "pfeiffer", "layer_norm", "bitfit"):
        before = set(trainable(model))
        install(model, method, {})
        assert len(before) < len(trainable(model))
        assert torch.equal(values(model, "bert"), values(bare("bert"), "bert"))
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert names == list(trainable(model))
    assert not any(name.startswith("classifier") for name in names)
    assert "bert.encoder.layer.0.output.base_layer.dense.base_layer.fedpeft_houlsby.down.weight" in names


def test_one_method_on_a_module_and_on_one_inside_it() -> None:
    model = stirred("llama", "houlsby", {"target_modules": ["mlp", "down_proj"], "layers": [0]})
    mlp = model.model.layers[0].mlp
    down = mlp.base_layer.down_proj
    inside = mlp.base_layer.act_fn(mlp.gate_proj(X)) * mlp.up_proj(X)
    h = down.base_layer(inside)
    h = h + bottleneck(down.fedpeft_houlsby, h, 1.0, gelu)
    assert torch.allclose(mlp(X), h + bottleneck(mlp.fedpeft_houlsby, h, 1.0, gelu), rtol=1e-4, atol=1e-4)
    assert len(trainable(model)) == 2 * 4


@pytest.mark.parametrize("kind", ["vit", "dinov2"])
def test_a_visual_prompt_stands_between_what_an_image_begins_with_and_its_patches(kind: str) -> None:
    model, plainly = bare(kind), values(bare(kind), kind)
    install(model, "visual_prompt", {"tokens": 3})
    ((name, vectors),) = trainable(model).items()
    assert name.endswith("embeddings.fedpeft_visual_prompt.vectors")
    layer = model.get_submodule(name.rpartition(".fedpeft_")[0])
    pixels = tiny_models.batch(kind, 9)["pixel_values"]
    made, plain = layer(pixels), layer.base_layer(pixels)
    assert torch.equal(made[:, :1], plain[:, :1])
    assert torch.equal(made[:, 1:4], vectors.expand(len(pixels), -1, -1))
    assert torch.equal(made[:, 4:], plain[:, 1:])
    assert not torch.equal(values(model, kind), plainly)
    torch.autograd.backward(loss(model, kind, 9))
    assert vectors.grad is not None
    assert bool(torch.all(vectors.grad.abs().sum(1) > 0))
    with switched_off(model):
        assert torch.equal(values(model, kind), plainly)


def test_a_visual_prompt_on_a_base_of_texts_is_one_sentence() -> None:
    with pytest.raises(ModelError, match="expected a base that reads images patch by patch, found BertFor"):
        install(tiny_models.bert(), "visual_prompt", {})
