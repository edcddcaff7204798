from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from fedpeft import adaptation, models
from fedpeft.adapter_folders import read_adapter_folder
from fedpeft.adapters import AdapterState, as_lora, at_rank, factors, low_rank_modules, resized
from fedpeft.config.adapters import LoraSb
from fedpeft.errors import ModelError
from fedpeft.models import AdaptedModel
from fedpeft.randomness import rng
from fedpeft.sb_layers import factors_of
from tests import tiny
from tests.tiny import logits, moved

pytestmark = pytest.mark.usefixtures("one_thread")

QUERY = "bert.encoder.layer.0.attention.self.query"
# Square, wide and tall weights: 16 x 16, 24 x 16, 16 x 24.
EVERYWHERE = ("query", "intermediate.dense", "output.dense")
# A scale that is no power of two, so that leaving it out or folding it twice is seen.
SCALED = LoraSb(rank=3, alpha=5.0, target_modules=EVERYWHERE)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny GPT-2, whose layers keep their weights transposed, with the tiny tokenizer."""
    folder = tiny.build(tmp_path_factory.mktemp("gpt2"))
    settings = transformers.GPT2Config(
        vocab_size=19, n_embd=16, n_head=2, n_layer=1, n_positions=32, initializer_range=0.2
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.GPT2Model(settings).save_pretrained(str(folder))
    return folder


def arrays(rows: int, columns: int, seed: int) -> np.ndarray:
    return rng(seed, "weight").standard_normal((rows, columns)).astype(np.float32)


def layer_at(adapted: AdaptedModel, path: str) -> Any:
    model: Any = adapted.model
    return model.base_model.model.get_submodule(path)


def settled(state: AdapterState, seed: int = 3) -> AdapterState:
    """The adapter after its squares and head, and nothing else, moved by random numbers."""
    after = moved(state, seed).tensors
    return AdapterState(
        state.spec, {key: value if key.endswith((".A", ".B")) else after[key] for key, value in state.tensors.items()}
    )


def test_factors_of_a_diagonal_weight_are_its_greatest_entries() -> None:
    """Of diag(3, 1) over a row of zeros, the best rank 1 is 3 at the top left; U S takes the 3 and Vᵀ the direction."""
    weight = torch.tensor([[3.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    a, b = factors_of(weight, 1)
    assert a.shape == (1, 2)
    assert b.shape == (3, 1)
    np.testing.assert_allclose(a.abs(), [[1.0, 0.0]], atol=1e-6)
    np.testing.assert_allclose(b.abs(), [[3.0], [0.0], [0.0]], atol=1e-6)
    np.testing.assert_allclose(b @ a, [[3.0, 0.0], [0.0, 0.0], [0.0, 0.0]], atol=1e-6)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 99), st.data())
def test_factors_are_the_best_approximation_of_the_weight(
    rows: int, columns: int, seed: int, data: st.DataObject
) -> None:
    rank = data.draw(st.integers(1, min(rows, columns)))
    weight = arrays(rows, columns, seed)
    a, b = (part.numpy().astype(np.float64) for part in factors_of(torch.from_numpy(weight), rank))
    values = np.linalg.svd(weight.astype(np.float64), compute_uv=False)
    np.testing.assert_allclose(a @ a.T, np.eye(rank), atol=1e-5)
    np.testing.assert_allclose(b.T @ b, np.diag(values[:rank] ** 2), atol=1e-4 * values[0] ** 2)
    missed = np.linalg.norm(weight - b @ a)
    assert missed == pytest.approx(np.linalg.norm(values[rank:]), abs=1e-4 * values[0])


def test_factors_of_a_great_weight_hold_nearly_all_that_they_could() -> None:
    """The worst case, where no singular value stands out, and one like a trained weight's, where they fall off."""
    flat = torch.from_numpy(arrays(300, 200, 0))
    falling = flat @ torch.diag(torch.logspace(0, -2, 200))
    for weight, least in ((flat, 0.99), (falling, 0.99999)):
        values = torch.linalg.svdvals(weight)
        a, b = factors_of(weight, 20)
        assert float((b @ a).norm() / values[:20].norm()) > least
        np.testing.assert_allclose(a @ a.T, np.eye(20), atol=1e-5)


def test_a_fresh_adapter_is_the_svd_of_each_weight_and_changes_no_logit(tiny_model: Path) -> None:
    adapted = tiny.load(tiny_model, SCALED)
    model: Any = adapted.model
    for module in low_rank_modules(adapted.spec):
        weight = layer_at(adapted, module.path).base_layer.weight.detach().numpy()
        values = np.linalg.svd(weight, compute_uv=False)
        a, b, r = (adapted.initial.tensors[f"{module.path}.{name}"] for name in ("A", "B", "R"))
        assert np.linalg.norm(weight - b @ a) == pytest.approx(np.linalg.norm(values[3:]), rel=1e-4)
        assert not r.any()
    fresh = logits(model)
    with model.disable_adapter():
        hidden = model.base_model.model.bert(**tiny.batch()).pooler_output.detach()
    head = {key: torch.from_numpy(adapted.initial.tensors[f"classifier.{key}"]) for key in ("weight", "bias")}
    assert torch.allclose(fresh, hidden @ head["weight"].T + head["bias"], atol=1e-6)


def test_specification_by_hand(tiny_model: Path) -> None:
    spec = tiny.load(tiny_model, SCALED).spec
    assert spec.family == "lora_sb"
    query = next(module for module in spec.modules if module.path == QUERY)
    assert (query.kind, query.rank) == ("lora_sb", 3)
    assert query.scale == pytest.approx(5 / 3)
    assert query.shapes == (("A", (3, 16)), ("B", (16, 3)), ("R", (3, 3)))
    wide = next(module for module in spec.modules if module.path == "bert.encoder.layer.1.intermediate.dense")
    assert wide.shapes == (("A", (3, 16)), ("B", (24, 3)), ("R", (3, 3)))
    assert {module.kind for module in spec.modules} == {"lora_sb", "full"}


def test_the_specification_does_not_depend_on_the_factors(tiny_model: Path) -> None:
    """Another library's SVD may differ in the last bit; its node has the same digest all the same."""
    one, other = tiny.load(tiny_model, SCALED), tiny.load(tiny_model, SCALED)
    layer_at(other, QUERY).lora_A["default"].weight.data.neg_()
    found = [adaptation.describe(each.model, each.family, each.head)[0].digest for each in (one, other)]
    assert found[0] == found[1]


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_a_layer_is_the_dense_layer_with_the_product_added(tiny_model: Path, rank: int) -> None:
    adapted = tiny.load(tiny_model, SCALED)
    state = moved(adapted.initial)
    spec = at_rank(state.spec, rank)
    models.install(adapted, AdapterState(spec, resized(state.tensors, spec)))
    for module in low_rank_modules(adapted.spec):
        a, b, r = (state.tensors[f"{module.path}.{name}"].astype(np.float64) for name in ("A", "B", "R"))
        change = b[:, :rank] @ r[:rank, :rank] @ a[:rank]
        layer = layer_at(adapted, module.path)
        weight, bias = (part.detach().numpy().astype(np.float64) for part in layer.base_layer.parameters())
        x = arrays(5, weight.shape[1], 1)
        np.testing.assert_allclose(
            layer(torch.from_numpy(x)).detach(), x @ (weight + change).T + bias, rtol=1e-4, atol=1e-4
        )


# peft says that it takes a transposed weight for what it is.
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")
def test_a_transposed_layer_is_the_dense_layer_with_the_product_added(gpt2: Path) -> None:
    adapted = tiny.load(gpt2, LoraSb(rank=4, alpha=6.0, target_modules=("c_attn", "attn.c_proj")))
    state = moved(adapted.initial)
    paths = [module.path for module in low_rank_modules(adapted.spec)]
    assert [path.rpartition(".")[2] for path in paths] == ["c_attn", "c_proj"]
    for path in paths:
        weight = layer_at(adapted, path).base_layer.weight.detach().numpy()
        a, b = (adapted.initial.tensors[f"{path}.{name}"] for name in ("A", "B"))
        kept = np.linalg.norm(np.linalg.svd(weight, compute_uv=False)[4:])
        assert np.linalg.norm(weight.T - b @ a) == pytest.approx(kept, rel=1e-4)
    models.install(adapted, state)
    for module in low_rank_modules(adapted.spec):
        layer = layer_at(adapted, module.path)
        weight, bias = (part.detach().numpy().astype(np.float64) for part in layer.base_layer.parameters())
        product = factors(module, state.tensors)
        x = arrays(5, 16, 1)
        expected = x @ (weight + (product.b @ product.a).T) + bias
        np.testing.assert_allclose(layer(torch.from_numpy(x)).detach(), expected, rtol=1e-4, atol=1e-4)


def test_the_gradient_reaches_the_square_alone(tiny_model: Path) -> None:
    """∂L/∂R is s Bᵀ G Aᵀ, where G is the gradient of the whole weight; it is there although R is zero."""
    adapted = tiny.load(tiny_model, SCALED)
    layer = layer_at(adapted, QUERY)
    weight = layer.base_layer.weight.requires_grad_(True)
    adapted.model.requires_grad_(True)
    adapted.model.eval()
    adapted.model(**tiny.batch()).logits.square().sum().backward()
    a, b = (adapted.initial.tensors[f"{QUERY}.{name}"].astype(np.float64) for name in ("A", "B"))
    expected = 5 / 3 * b.T @ weight.grad.numpy() @ a.T
    assert np.abs(expected).max() > 1e-2
    np.testing.assert_allclose(layer.lora_B["default"].square.grad, expected, rtol=1e-3, atol=1e-5)
    for module in low_rank_modules(adapted.spec):
        for name in ("A", "B"):
            parameter = adapted.bindings[f"{module.path}.{name}"].parameter
            assert parameter.grad is None
        assert adapted.bindings[f"{module.path}.R"].parameter.grad is not None


@pytest.mark.parametrize(("alpha", "exact"), [(8.0, True), (5.0, False)])
@pytest.mark.parametrize("rank", [1, 2, 3, 4])
def test_extract_undoes_install_at_every_rank(tiny_model: Path, alpha: float, exact: bool, rank: int) -> None:
    adapted = tiny.load(tiny_model, LoraSb(rank=4, alpha=alpha))
    state = moved(adapted.initial)
    spec = at_rank(state.spec, rank)
    cut = AdapterState(spec, resized(state.tensors, spec))
    models.install(adapted, cut)
    back = models.extract(adapted)
    assert back.spec == spec
    for key, value in cut.tensors.items():
        if exact or not key.endswith(".R"):
            assert back.tensors[key].tobytes() == value.tobytes(), key
        else:
            np.testing.assert_allclose(back.tensors[key], value, rtol=2**-22)
    models.install(adapted, state)
    assert models.extract(adapted).spec == adapted.spec


def test_the_product_is_what_the_weight_changes_by(tiny_model: Path) -> None:
    adapted = tiny.load(tiny_model, SCALED)
    state = moved(adapted.initial)
    models.install(adapted, state)
    for module in low_rank_modules(adapted.spec):
        product = factors(module, state.tensors)
        change = layer_at(adapted, module.path).get_delta_weight("default").detach()
        np.testing.assert_allclose(change, product.b @ product.a, rtol=1e-4, atol=1e-5)


def test_dropout_falls_on_what_the_adapter_reads(tiny_model: Path) -> None:
    adapted = tiny.load(tiny_model, LoraSb(rank=3, dropout=0.5))
    models.install(adapted, moved(adapted.initial))
    layer, x = layer_at(adapted, QUERY), torch.from_numpy(arrays(4, 16, 0))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer.train()
        assert not torch.equal(layer(x), layer(x))
        layer.eval()
        assert torch.equal(layer(x), layer(x))


def stock(folder: Path) -> torch.nn.Module:
    made = transformers.AutoModelForSequenceClassification.from_pretrained(
        str(folder), num_labels=3, dtype=torch.float32, local_files_only=True
    )
    return made  # type: ignore[no-any-return]


# peft asks each model for a property that transformers has renamed.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("rank", [1, 3])
def test_a_saved_adapter_is_a_stock_lora(tiny_model: Path, tmp_path: Path, rank: int) -> None:
    adapted = tiny.load(tiny_model, SCALED, seed=1)
    spec = at_rank(adapted.spec, rank)
    state = AdapterState(spec, resized(settled(adapted.initial).tensors, spec))
    models.save_adapter(adapted, state, tmp_path)
    models.install(adapted, state)
    loaded = peft.PeftModel.from_pretrained(stock(tiny_model), str(tmp_path))
    assert torch.equal(logits(loaded), logits(adapted.model))
    assert not torch.allclose(logits(loaded), logits(tiny.load(tiny_model, SCALED, seed=1).model), atol=1e-2)
    read, expected = read_adapter_folder(tmp_path).state, as_lora(state)
    assert {m.path: m.rank for m in read.spec.modules} == {m.path: m.rank for m in expected.spec.modules}
    for key, value in expected.tensors.items():
        np.testing.assert_allclose(read.tensors[key], value, rtol=1e-4, atol=1e-5)


def test_a_merged_model_is_a_stock_model(tiny_model: Path, tmp_path: Path) -> None:
    adapted = tiny.load(tiny_model, SCALED, seed=1)
    state = settled(adapted.initial)
    models.save_merged(adapted, state, tmp_path)
    models.install(adapted, state)
    expected = logits(adapted.model)
    assert torch.allclose(logits(stock(tmp_path)), expected, atol=1e-4, rtol=1e-4)
    models.install(adapted, adapted.initial)
    assert not torch.allclose(logits(adapted.model), expected, atol=1e-2)


def test_a_copy_of_the_model_stands_alone(tiny_model: Path) -> None:
    adapted = tiny.load(tiny_model, SCALED)
    models.install(adapted, moved(adapted.initial))
    before = logits(adapted.model)
    other = copy.deepcopy(adapted.model)
    models.install(adapted, adapted.initial)
    assert torch.equal(logits(other), before)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            LoraSb(rank=2, target_modules=("word_embeddings",)),
            r"adapter\.lora_sb\.target_modules: expected linear layers, found Embedding at "
            r"bert\.embeddings\.word_embeddings",
        ),
        (
            LoraSb(rank=17),
            r"adapter\.lora_sb\.rank: expected at most 16, the smaller side of "
            r"bert\.encoder\.layer\.0\.attention\.self\.query, found 17",
        ),
        (LoraSb(rank=2, target_modules=("nothing",)), r"adapter\.lora_sb\.target_modules: expected modules of Bert"),
    ],
)
def test_what_the_family_cannot_adapt_is_one_sentence(tiny_model: Path, settings: LoraSb, words: str) -> None:
    with pytest.raises(ModelError, match=words) as caught:
        tiny.load(tiny_model, settings)
    assert "\n" not in str(caught.value)


def test_a_rank_as_great_as_the_weight_is_allowed(tiny_model: Path) -> None:
    adapted = tiny.load(tiny_model, LoraSb(rank=16))
    weight = layer_at(adapted, QUERY).base_layer.weight.detach()
    a, b = (adapted.initial.tensors[f"{QUERY}.{name}"] for name in ("A", "B"))
    np.testing.assert_allclose(b @ a, weight, atol=1e-5)
