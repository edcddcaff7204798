from __future__ import annotations

import contextlib
import copy
import io
import json
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.numpy import load_file

from fedpeft import models
from fedpeft.adapters import AdapterSpec, AdapterState, absorbed, at_ranks, low_rank_modules
from fedpeft.config.adapters import Lora
from fedpeft.errors import AdapterError, ModelError, RunFolderError
from fedpeft.models import AdaptedModel
from fedpeft.randomness import rng
from fedpeft.runs import write_folder
from tests import tiny
from tests.tiny import FAMILIES, logits, moved

pytestmark = pytest.mark.usefixtures("one_thread")
families = pytest.mark.parametrize("family", sorted(FAMILIES))


def stock(folder: Path, **more: object) -> torch.nn.Module:
    made = transformers.AutoModelForSequenceClassification.from_pretrained(
        str(folder), num_labels=3, dtype=torch.float32, local_files_only=True, **more
    )
    return made  # type: ignore[no-any-return]


def bits(tensors: object) -> dict[str, bytes]:
    return {key: np.asarray(value).tobytes() for key, value in tensors.items()}  # type: ignore[attr-defined]


@pytest.mark.parametrize("family", ["lora", "ia3"])
def test_a_fresh_adapter_changes_no_logit(tiny_model: Path, family: str) -> None:
    adapted = tiny.load(tiny_model, family)
    with adapted.model.disable_adapter():  # type: ignore[operator]
        base = adapted.model.base_model.model.bert(**tiny.batch()).pooler_output
    head = adapted.initial.tensors
    plain = base.detach() @ torch.from_numpy(head["classifier.weight"]).T + torch.from_numpy(head["classifier.bias"])
    assert torch.allclose(logits(adapted.model), plain, atol=1e-6)


def test_equal_adapters_are_equal_files_in_every_process(tiny_model: Path, tmp_path: Path) -> None:
    # peft keeps names in sets, whose order is another in each process.
    adapted = tiny.load(tiny_model, Lora(rank=2, target_modules=("value", "query", "key", "dense", "pooler.dense")))
    models.save_adapter(adapted, adapted.initial, tmp_path)
    named = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))["target_modules"]
    assert named == ["dense", "key", "pooler.dense", "query", "value"]


@families
def test_the_base_is_the_one_in_the_folder(tiny_model: Path, family: str) -> None:
    adapted = tiny.load(tiny_model, family)
    on_disk = transformers.AutoModel.from_pretrained(str(tiny_model)).state_dict()
    held = {name: p for name, p in adapted.model.named_parameters() if not p.requires_grad}
    for name, value in on_disk.items():
        ends = (f"bert.{name}", f"bert.{name.replace('.weight', '.base_layer.weight')}")
        found = [
            p for key, p in held.items() if key.endswith((*ends, f"bert.{name.replace('.bias', '.base_layer.bias')}"))
        ]
        assert len(found) == 1, name
        assert torch.equal(found[0], value)
    assert adapted.base_parameters == sum(v.numel() for v in on_disk.values()) + 3 * 16 + 3


def test_specifications_by_hand(tiny_model: Path) -> None:
    lora = tiny.load(tiny_model, "lora").spec
    query = lora.modules[0]
    assert (query.path, query.kind, query.rank) == ("bert.encoder.layer.0.attention.self.query", "lora", 3)
    assert query.scale == pytest.approx(5 / 3)
    assert query.shapes == (("A", (3, 16)), ("B", (16, 3)))
    assert lora.parameters == 4 * 2 * 3 * 16 + 3 * 16 + 3
    assert tiny.load(tiny_model, "head_only").spec.parameters == 3 * 16 + 3
    assert tiny.load(tiny_model, "prompt_tuning").spec.parameters == 4 * 16 + 3 * 16 + 3
    # Keys and values 16 each, the attention's output 16, the feed-forward's input 24, in two layers.
    assert tiny.load(tiny_model, "ia3").spec.parameters == 2 * (16 + 16 + 16 + 24) + 3 * 16 + 3
    stabilised = tiny.load(tiny_model, Lora(rank=4, alpha=6.0, rank_stabilised=True)).spec.modules[0]
    assert stabilised.scale == pytest.approx(3.0)
    one_layer = tiny.load(tiny_model, Lora(rank=2, layers=(1,))).spec
    assert all("layer.1." in module.path for module in one_layer.modules[:-1])


@families
def test_extract_undoes_install(tiny_model: Path, family: str) -> None:
    adapted = tiny.load(tiny_model, family)
    state = moved(adapted.initial)
    models.install(adapted, state)
    back = models.extract(adapted).tensors
    for key, value in state.tensors.items():
        # The scale 5/3 is divided out and multiplied in again: one rounding each.
        np.testing.assert_allclose(back[key], value, rtol=2**-22, atol=0)
        if not key.endswith(".B"):
            assert back[key].tobytes() == value.tobytes()


@pytest.mark.parametrize("alpha", [2.0, 8.0, 32.0])
def test_extract_undoes_install_to_the_bit_where_the_scale_is_a_power_of_two(tiny_model: Path, alpha: float) -> None:
    adapted = tiny.load(tiny_model, Lora(rank=4, alpha=alpha))
    state = moved(adapted.initial)
    models.install(adapted, state)
    assert bits(models.extract(adapted).tensors) == bits(state.tensors)


def test_what_is_extracted_is_a_copy(tiny_model: Path) -> None:
    adapted = tiny.load(tiny_model)
    before, state = models.extract(adapted), moved(adapted.initial)
    held = bits(before.tensors)
    models.install(adapted, state)
    assert bits(before.tensors) == held == bits(adapted.initial.tensors)
    installed = bits(state.tensors)
    for binding in adapted.bindings.values():
        binding.parameter.data.add_(1)
    assert bits(state.tensors) == installed


def test_the_product_of_the_factors_is_what_the_weight_changes_by(tiny_model: Path) -> None:
    adapted = tiny.load(tiny_model, Lora(rank=3, alpha=5.0))
    state = moved(adapted.initial)
    models.install(adapted, state)
    path = "bert.encoder.layer.0.attention.self.query"
    layer = adapted.model.base_model.model.get_submodule(path)  # type: ignore[operator]
    change = layer.get_delta_weight("default").detach().numpy()
    np.testing.assert_allclose(change, state.tensors[f"{path}.B"] @ state.tensors[f"{path}.A"], rtol=1e-5, atol=1e-6)


@families
def test_an_adapter_drawn_under_one_seed_is_the_same_model_under_another(tiny_model: Path, family: str) -> None:
    one, other = tiny.load(tiny_model, family, seed=1), tiny.load(tiny_model, family, seed=2)
    assert one.spec.digest == other.spec.digest
    assert bits(one.initial.tensors) != bits(other.initial.tensors)
    state = moved(one.initial)
    models.install(one, state)
    models.install(other, state)
    assert torch.equal(logits(one.model), logits(other.model))


@families
def test_one_seed_draws_one_adapter_and_leaves_the_global_generator(tiny_model: Path, family: str) -> None:
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    one = tiny.load(tiny_model, family, seed=7)
    assert torch.equal(torch.rand(3), expected)
    assert bits(one.initial.tensors) == bits(tiny.load(tiny_model, family, seed=7).initial.tensors)


def test_another_base_has_another_digest(tiny_model: Path, tmp_path: Path) -> None:
    other = tiny.build(tmp_path / "other", seed=1)
    assert tiny.load(tiny_model).spec.digest != tiny.load(other).spec.digest


def test_an_adapter_of_another_specification_is_refused(tiny_model: Path) -> None:
    adapted, other = tiny.load(tiny_model), tiny.load(tiny_model, Lora(rank=4))
    with pytest.raises(AdapterError, match=r"adapter: expected specification .*, found"):
        models.install(adapted, other.initial)
    broken = {**adapted.initial.tensors, "classifier.bias": np.full(3, np.nan, np.float32)}
    before = bits(models.extract(adapted).tensors)
    with pytest.raises(AdapterError, match=r"classifier\.bias: expected finite numbers"):
        models.install(adapted, AdapterState(adapted.spec, broken))
    assert bits(models.extract(adapted).tensors) == before


# peft asks each model for a property that transformers has renamed.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@families
def test_a_saved_adapter_loads_with_stock_libraries(tiny_model: Path, tmp_path: Path, family: str) -> None:
    adapted = tiny.load(tiny_model, family, seed=1)
    state = moved(adapted.initial)
    models.save_adapter(adapted, state, tmp_path / "adapter")
    models.install(adapted, state)
    if family == "head_only":
        loaded = stock(tmp_path / "adapter")
    else:
        loaded = peft.PeftModel.from_pretrained(stock(tiny_model), str(tmp_path / "adapter"))
    assert torch.equal(logits(loaded), logits(adapted.model))
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(tmp_path / "adapter"))
    assert tokenizer("good film")["input_ids"] == adapted.tokenizer("good film")["input_ids"]


@pytest.mark.parametrize("family", ["lora", "ia3", "head_only"])
def test_a_merged_model_is_a_stock_model_and_leaves_the_adapted_one_whole(
    tiny_model: Path, tmp_path: Path, family: str
) -> None:
    adapted = tiny.load(tiny_model, family, seed=1)
    state = moved(adapted.initial)
    models.save_merged(adapted, state, tmp_path / "merged")
    merged = logits(stock(tmp_path / "merged"))
    models.install(adapted, state)
    assert torch.allclose(merged, logits(adapted.model), atol=1e-4, rtol=1e-4)
    assert bits(models.extract(adapted).tensors).keys() == bits(state.tensors).keys()
    fresh = tiny.load(tiny_model, family, seed=2)
    models.install(adapted, fresh.initial)
    models.install(fresh, fresh.initial)
    assert torch.equal(logits(adapted.model), logits(fresh.model))


def test_a_prompt_cannot_be_merged(tiny_model: Path, tmp_path: Path) -> None:
    adapted = tiny.load(tiny_model, "prompt_tuning")
    with pytest.raises(ModelError, match="adapter family prompt_tuning: expected one that can be merged"):
        models.save_merged(adapted, adapted.initial, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("content", [None, "empty", "garbage", "weights"])
def test_a_model_that_cannot_be_loaded_is_one_sentence(tiny_model: Path, tmp_path: Path, content: str | None) -> None:
    source = tmp_path / "model"
    if content:
        source.mkdir()
    if content == "garbage":
        (source / "config.json").write_text("{")
    if content == "weights":
        tiny.build(source)
        (source / "model.safetensors").write_bytes(b"\x00" * 100)
    with pytest.raises(ModelError, match=r"model\.source .*: expected a model that transformers can load") as caught:
        tiny.load(source)
    assert "\n" not in str(caught.value)


def test_a_head_of_another_size_is_one_sentence(tmp_path: Path) -> None:
    source = tiny.build(tmp_path / "five", labels=5)
    with pytest.raises(ModelError, match=r"model\.source"):
        tiny.load(source)


def test_a_head_of_the_right_size_is_taken_over(tmp_path: Path) -> None:
    source = tiny.build(tmp_path / "three", labels=3)
    one, other = tiny.load(source, seed=1), tiny.load(source, seed=2)
    assert bits({"w": one.initial.tensors["classifier.weight"]}) == bits(
        {"w": other.initial.tensors["classifier.weight"]}
    )


@pytest.mark.parametrize(
    "settings", [Lora(target_modules=("nothing",)), Lora(layers=(9,)), Lora(target_modules=("LayerNorm",))]
)
def test_a_target_that_the_model_has_not_is_one_sentence(tiny_model: Path, settings: Lora) -> None:
    expected = r"adapter\.lora(\.target_modules)?: expected (settings that fit|modules of) Bert"
    with pytest.raises(ModelError, match=expected):
        tiny.load(tiny_model, settings)


def test_a_missing_gpu_is_one_sentence(tiny_model: Path) -> None:
    if torch.cuda.is_available():
        return
    with pytest.raises(ModelError, match=r"model\.device: expected a CUDA device, found none"):
        models.load(tiny.ModelConfig(source=str(tiny_model), device="cuda"), FAMILIES["lora"].build(), tiny.HEAD, 0)


def test_a_text_shares_the_positions_with_the_virtual_tokens(tiny_model: Path) -> None:
    assert models.most_tokens(tiny.load(tiny_model, "lora")) == 40
    assert models.most_tokens(tiny.load(tiny_model, "prompt_tuning")) == 36


def test_labels_are_written_into_the_model(tiny_model: Path) -> None:
    adapted = tiny.load(tiny_model)
    assert adapted.model.config.id2label == {0: "no", 1: "maybe", 2: "yes"}  # type: ignore[union-attr]


def test_dropout_is_what_the_settings_say(tiny_model: Path) -> None:
    for rate in (0.0, 0.3):
        adapted = tiny.load(tiny_model, dropout=rate)
        found = {m.p for m in adapted.model.modules() if isinstance(m, torch.nn.Dropout)}
        assert found == {rate}


# Other ranks, and a residual beside the base, against weights that are changed densely.


@pytest.fixture(scope="module")
def tiny_gpt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random GPT-2, whose layers hold their weights transposed, with the tokenizer of the tiny BERT."""
    folder = tiny.build(tmp_path_factory.mktemp("tiny-gpt"))
    for name in ("model.safetensors", "config.json"):
        (folder / name).unlink()
    settings = transformers.GPT2Config(
        vocab_size=19, n_positions=40, n_embd=16, n_layer=2, n_head=2, initializer_range=0.2, pad_token_id=0
    )
    with torch.random.fork_rng(), contextlib.redirect_stderr(io.StringIO()):
        torch.manual_seed(0)
        transformers.GPT2Model(settings).save_pretrained(str(folder))
    return folder


# Base, and modules of unlike shapes: BERT's are 16 x 16, 24 x 16 and 16 x 24; GPT-2's 48 x 16 and 64 x 16 and the
# embedding of 19 words. The rank is that of the square modules' sides in one case.
BASES: dict[str, tuple[str, Lora]] = {
    "linear": ("tiny_model", Lora(rank=3, alpha=5.0, target_modules=("query", "dense"))),
    "out is rank": ("tiny_model", Lora(rank=16, alpha=8.0, target_modules=("query", "value"))),
    "conv1d": ("tiny_gpt", Lora(rank=3, alpha=5.0, target_modules=("c_attn", "c_fc"))),
    "embedding": ("tiny_gpt", Lora(rank=3, alpha=5.0, target_modules=("wte", "c_attn"))),
    "stabilised": ("tiny_model", Lora(rank=4, alpha=6.0, rank_stabilised=True)),
}


@pytest.fixture(scope="module", params=sorted(BASES))
def base(request: pytest.FixtureRequest) -> tuple[Path, AdaptedModel]:
    """The folder of a base, and the base with an adapter on it; tests install what they need."""
    name, settings = BASES[request.param]
    source: Path = request.getfixturevalue(name)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False", category=UserWarning)
        return source, tiny.load(source, settings)


def drawn(spec: AdapterSpec, seed: int = 0) -> dict[str, np.ndarray]:
    random = rng(seed, "drawn")
    return {key: (0.3 * random.standard_normal(shape)).astype(np.float32) for key, shape in spec.shapes.items()}


def unlike(adapted: AdaptedModel, *ranks: int, residual: tuple[int, ...] = (), seed: int = 0) -> AdapterState:
    """A random adapter at these ranks, turn by turn, and a residual at those (none: none)."""
    paths = [module.path for module in low_rank_modules(adapted.spec)]

    def at(given: tuple[int, ...]) -> AdapterSpec:
        return at_ranks(adapted.spec, {path: given[turn % len(given)] for turn, path in enumerate(paths)})

    beside = at(residual).only(f"{path}.{name}" for path in paths for name in "AB") if residual else None
    spec = at(ranks)
    return AdapterState(spec, drawn(spec, seed), drawn(beside, seed + 1) if beside else {})


def dense_logits(source: Path, state: AdapterState) -> torch.Tensor:
    """What a stock model computes whose weights were changed by B A and by the residual's."""
    model = stock(source)
    products = [
        (module.path, tensors[f"{module.path}.B"].astype(np.float64) @ tensors[f"{module.path}.A"])
        for tensors in (state.tensors, state.residual)
        for module in low_rank_modules(state.spec)
        if f"{module.path}.A" in tensors
    ]
    with torch.no_grad():
        for path, product in products:
            layer = model.get_submodule(path)
            change = torch.from_numpy(product)
            layer.weight += (change if isinstance(layer, torch.nn.Linear) else change.T).float()  # type: ignore[operator]
        for key, value in state.tensors.items():
            if key.startswith(("classifier", "score")):
                model.get_parameter(key).copy_(torch.from_numpy(value))
    return logits(model)


RANKS = [(3,), (1, 4, 2), (20,)]


@pytest.mark.parametrize("ranks", RANKS)
def test_a_model_computes_at_the_ranks_that_it_is_given(
    base: tuple[Path, AdaptedModel], ranks: tuple[int, ...]
) -> None:
    source, adapted = base
    state = unlike(adapted, *ranks)
    models.install(adapted, state)
    np.testing.assert_allclose(logits(adapted.model), dense_logits(source, state), atol=1e-5, rtol=1e-5)
    back = models.extract(adapted)
    assert (back.spec, back.residual) == (state.spec, {})
    for key, value in state.tensors.items():
        np.testing.assert_allclose(back.tensors[key], value, rtol=2**-22, atol=0)


@pytest.mark.parametrize(("ranks", "residual"), [((3,), (2,)), ((1, 4), (5, 0, 16))])
def test_a_residual_acts_beside_the_base(
    base: tuple[Path, AdaptedModel], ranks: tuple[int, ...], residual: tuple[int, ...]
) -> None:
    source, adapted = base
    state = unlike(adapted, *ranks, residual=residual)
    models.install(adapted, state)
    np.testing.assert_allclose(logits(adapted.model), dense_logits(source, state), atol=1e-5, rtol=1e-5)
    whole = absorbed(state)
    assert not np.allclose(logits(adapted.model), dense_logits(source, replace(state, residual={})), atol=1e-3)
    models.install(adapted, whole)
    np.testing.assert_allclose(logits(adapted.model), dense_logits(source, state), atol=1e-5, rtol=1e-5)


def test_what_was_installed_before_leaves_no_trace(base: tuple[Path, AdaptedModel]) -> None:
    source, adapted = base
    plain = unlike(adapted, 3)
    models.install(adapted, plain)
    expected = logits(adapted.model)
    for before in (unlike(adapted, 5, 1, residual=(2, 3)), unlike(adapted, 2, residual=(1,)), unlike(adapted, 4)):
        models.install(adapted, before)
        logits(adapted.model)
        models.install(adapted, plain)
        assert torch.equal(logits(adapted.model), expected)
        assert bits(models.extract(adapted).tensors).keys() == bits(plain.tensors).keys()
    again = unlike(adapted, 3, residual=(2,))
    models.install(adapted, again)
    np.testing.assert_allclose(logits(adapted.model), dense_logits(source, again), atol=1e-5, rtol=1e-5)


def frozen(adapted: AdaptedModel) -> dict[str, bytes]:
    named = adapted.model.named_parameters()
    own = {id(binding.parameter) for binding in adapted.bindings.values()}
    return bits({name: p.detach().numpy() for name, p in named if id(p) not in own and "fedpeft_residual" not in name})


def test_a_residual_that_is_switched_off_leaves_the_base_bit_identical(base: tuple[Path, AdaptedModel]) -> None:
    adapted = copy.deepcopy(base[1])

    def alone() -> torch.Tensor:
        with adapted.model.disable_adapter():  # type: ignore[operator]
            return logits(adapted.model)

    models.install(adapted, adapted.initial)
    before, held, expected = logits(adapted.model), frozen(adapted), alone()
    models.install(adapted, unlike(adapted, 3, residual=(4,)))
    assert frozen(adapted) == held
    assert torch.equal(alone(), expected)
    models.install(adapted, adapted.initial)
    assert frozen(adapted) == held
    assert torch.equal(logits(adapted.model), before)


def test_a_residual_is_never_trained(base: tuple[Path, AdaptedModel]) -> None:
    adapted = copy.deepcopy(base[1])
    state = unlike(adapted, 2, residual=(3,))
    models.install(adapted, state)
    adapted.model.train()
    adapted.model.zero_grad(set_to_none=True)
    adapted.model(**tiny.batch(), labels=torch.tensor([0, 1, 2])).loss.backward()
    trained = {id(binding.parameter) for binding in adapted.bindings.values()}
    for name, parameter in adapted.model.named_parameters():
        assert parameter.requires_grad == (id(parameter) in trained), name
        if id(parameter) not in trained:
            assert parameter.grad is None, name
    gradients = {key: binding.parameter.grad for key, binding in adapted.bindings.items()}
    assert all(grad is not None and torch.any(grad != 0) for grad in gradients.values())


def test_drawing_the_residuals_layers_leaves_the_global_generator(tiny_model: Path) -> None:
    adapted = tiny.load(tiny_model)
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    models.install(adapted, unlike(adapted, 3, residual=(1,)))
    assert torch.equal(torch.rand(3), expected)


# peft asks each model for a property that transformers has renamed.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("residual", [(), (5, 1)])
def test_an_adapter_of_unlike_ranks_and_all_that_the_base_took_up_load_with_stock_libraries(
    base: tuple[Path, AdaptedModel], tmp_path: Path, residual: tuple[int, ...]
) -> None:
    source, adapted = base
    before = adapted.model.peft_config["default"].to_dict()  # type: ignore[union-attr,index]
    state = unlike(adapted, 1, 4, 2, residual=residual)
    whole = absorbed(state)
    models.save_adapter(adapted, whole, tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(stock(source), str(tmp_path / "adapter"))
    models.install(adapted, whole)
    assert torch.equal(logits(loaded), logits(adapted.model))
    np.testing.assert_allclose(logits(loaded), dense_logits(source, state), atol=1e-5, rtol=1e-5)
    # What peft is told for the file stays out of the model.
    assert adapted.model.peft_config["default"].to_dict() == before  # type: ignore[union-attr,index]


# See above.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_after_a_residual_the_adapter_alone_is_saved(tiny_model: Path, tmp_path: Path) -> None:
    adapted = tiny.load(tiny_model)
    models.install(adapted, unlike(adapted, 3, residual=(2,)))
    plain = unlike(adapted, 3)
    models.save_adapter(adapted, plain, tmp_path / "adapter")
    names = {path.name for path in (tmp_path / "adapter").rglob("*")}
    assert "fedpeft_residual" not in names
    assert not any("fedpeft_residual" in key for key in load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    loaded = peft.PeftModel.from_pretrained(stock(tiny_model), str(tmp_path / "adapter"))
    models.install(adapted, plain)
    assert torch.equal(logits(loaded), logits(adapted.model))


@pytest.mark.parametrize("residual", [(), (2,)])
def test_a_merged_model_has_taken_up_other_ranks_and_the_residual(
    base: tuple[Path, AdaptedModel], tmp_path: Path, residual: tuple[int, ...]
) -> None:
    source, adapted = base
    state = unlike(adapted, 2, 5, residual=residual)
    models.save_merged(adapted, state, tmp_path / "merged")
    np.testing.assert_allclose(logits(stock(tmp_path / "merged")), dense_logits(source, state), atol=1e-4, rtol=1e-4)
    models.install(adapted, state)
    np.testing.assert_allclose(logits(adapted.model), dense_logits(source, state), atol=1e-5, rtol=1e-5)


def test_ranks_aside_an_adapter_of_another_specification_is_refused(tiny_model: Path) -> None:
    adapted, other = tiny.load(tiny_model), tiny.load(tiny_model, Lora(rank=3, alpha=5.0, layers=(1,)))
    models.install(adapted, unlike(adapted, 2))
    for state in (unlike(other, 3), unlike(tiny.load(tiny_model, Lora(rank=3, alpha=7.0)), 3)):
        with pytest.raises(AdapterError, match=r"adapter: expected specification .*, found"):
            models.install(adapted, state)
    wrong = unlike(adapted, 2)
    with pytest.raises(AdapterError, match=r"expected float32 of shape"):
        models.install(adapted, AdapterState(adapted.spec, wrong.tensors))
    assert models.extract(adapted).spec == wrong.spec


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from fedpeft import models
from fedpeft.errors import RunFolderError
from fedpeft.runs import write_folder
from tests import tiny
adapted = {family: tiny.load(Path(sys.argv[1]), family) for family in ("lora", "head_only")}
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
for one in adapted.values():
    try:
        write_folder(Path(sys.argv[2]), lambda folder: models.save_adapter(one, one.initial, folder))
    except RunFolderError as error:
        print(error)
"""


@pytest.mark.faults
def test_a_full_disk_under_an_adapter_is_one_sentence_and_leaves_the_one_before(
    tiny_model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "adapter"
    write_folder(folder, lambda scratch: (scratch / "before").touch())
    made = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tiny_model), str(folder)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent,
        check=False,
    )
    assert made.returncode == 0, made.stderr
    assert made.stdout.count("adapter: expected room to write it, found ") == 2
    assert made.stdout.count("File too large") == 2
    assert [path.name for path in tmp_path.rglob("*")] == ["adapter", "before"]
    assert RunFolderError.exit_code == 2
