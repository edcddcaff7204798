from __future__ import annotations

import json
import math
import re
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import safetensors.numpy
import safetensors.torch
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fedpeft.adapter_folders import read_adapter_folder, write_adapter_folder
from fedpeft.adapters import AdapterSpec, AdapterState, ModuleSpec, at_ranks, resized
from fedpeft.errors import AdapterError, RunFolderError

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # peft asks transformers 5 for it under its old name.
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
]

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
IDS = torch.tensor([[2, 5, 6, 9, 3], [2, 7, 3, 11, 1]])
SMALL: dict[str, Any] = {"vocab_size": 19, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES: dict[str, Any] = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}


def bert(layers: int = 2) -> nn.Module:
    config = transformers.BertConfig(**SMALL, **SIZES, num_hidden_layers=layers, num_labels=3, initializer_range=0.2)
    return transformers.BertForSequenceClassification(config)


def roberta() -> nn.Module:
    config = transformers.RobertaConfig(**SMALL, **SIZES, num_hidden_layers=1, num_labels=3, initializer_range=0.2)
    return transformers.RobertaForSequenceClassification(config)


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(**SMALL, n_embd=16, n_head=2, n_layer=2, n_positions=16, initializer_range=0.2)
    return transformers.GPT2LMHeadModel(config)


def llama() -> nn.Module:
    config = transformers.LlamaConfig(
        **SMALL, **SIZES, num_hidden_layers=2, tie_word_embeddings=False, initializer_range=0.2
    )
    return transformers.LlamaForCausalLM(config)


class Nested(nn.Module):
    """A base on which the path of one module is the end of another's."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(8, 8)
        self.block = nn.ModuleDict({"lin": nn.Linear(8, 8), "line": nn.Linear(8, 8)})

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        hidden = self.lin(nn.functional.one_hot(input_ids % 8, 8).float())
        made: torch.Tensor = self.block["line"](torch.tanh(self.block["lin"](hidden)))
        return made


@dataclass(frozen=True)
class Case:
    base: Callable[[], nn.Module]
    config: Mapping[str, Any]
    saving: Mapping[str, Any]
    full: tuple[str, ...] = ()
    embeddings: tuple[str, ...] = ()


def case(base: Callable[[], nn.Module], full: str = "", embeddings: str = "", **config: Any) -> Case:
    saving = {"save_embedding_layers": config.pop("save_embedding_layers", False)}
    return Case(base, {"r": 3, "lora_alpha": 5, **config}, saving, tuple(full.split()), tuple(embeddings.split()))


CLASSES = {"task_type": "SEQ_CLS", "full": "classifier"}
CAUSAL = {"task_type": "CAUSAL_LM"}
CASES = {
    "head": case(bert, target_modules=["query", "value"], **CLASSES),
    "head of two layers": case(
        roberta, target_modules=["query"], full="classifier.dense classifier.out_proj", task_type="SEQ_CLS"
    ),
    "rank-stabilised": case(bert, target_modules=["query", "value"], use_rslora=True, **CLASSES),
    "patterns": case(
        bert,
        target_modules=["query", "value", "intermediate.dense"],
        rank_pattern={"^bert.encoder.layer.0.attention.self.query": 2, r"layer\.1\..*\.(value|dense)": 6},
        alpha_pattern={"query": 7, "layer.1.intermediate.dense": 1},
        **CLASSES,
    ),
    "patterns, rank-stabilised": case(
        bert,
        target_modules=["query", "value"],
        use_rslora=True,
        # peft sorts patterns when it saves them, so what comes first must do so in order of name.
        rank_pattern={"layer.0.attention.self.query": 2, "query": 4},
        alpha_pattern={"layer.1.attention.self.value": 9, "value": 2},
        **CLASSES,
    ),
    "unlike modules": case(
        bert, target_modules=r".*layer\.(0\.attention\.self\.key|1\.output\.dense)", lora_alpha=1, **CLASSES
    ),
    "some layers": case(bert, target_modules=["query"], layers_to_transform=[1], layers_pattern="layer", **CLASSES),
    "more targets than peft keeps in a list": case(
        lambda: bert(5), target_modules=["query", "key", "value", "dense"], exclude_modules=["pooler.dense"], **CLASSES
    ),
    "Conv1D": case(gpt2, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True, **CAUSAL),
    "embedding": case(gpt2, target_modules=["wte", "wpe"], embeddings="transformer.wte transformer.wpe", **CAUSAL),
    "embedding with its base": case(
        llama,
        target_modules=["embed_tokens", "lm_head", "q_proj"],
        save_embedding_layers=True,
        rank_pattern={"embed_tokens": 5},
        full="lm_head.base_layer model.embed_tokens.base_layer",
        embeddings="model.embed_tokens",
        **CAUSAL,
    ),
    "embeddings of the base alone": case(
        llama, target_modules=["down_proj"], save_embedding_layers=True, full="lm_head model.embed_tokens", **CAUSAL
    ),
    "module to save": case(llama, target_modules="all-linear", modules_to_save=["lm_head"], full="lm_head", **CAUSAL),
    "no task": case(bert, target_modules=["query"]),
    "one path the end of another": case(Nested, target_modules="lin"),
    "orthogonal": case(bert, target_modules=["query"], r=2, init_lora_weights="orthogonal", **CLASSES),
}
cases = pytest.mark.parametrize("name", list(CASES))


def fresh(base: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return base().eval()


def trained(made: Case) -> Any:
    """The stock model of a case, every number of its adapter and head drawn anew."""
    base = fresh(made.base)
    model = peft.get_peft_model(base, peft.LoraConfig(**made.config))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)
    return model.eval()


def saved(made: Case, folder: Path) -> Any:
    model = trained(made)
    model.save_pretrained(str(folder), **made.saving)
    return model


def output(model: Any) -> torch.Tensor:
    with torch.no_grad():
        made = model(input_ids=IDS)
    return made if isinstance(made, torch.Tensor) else made.logits


def adapted(model: Any) -> dict[str, Any]:
    """peft's low-rank layers by path in the base."""
    found = model.base_model.model.named_modules()
    return {name: module for name, module in found if isinstance(module, peft.tuners.lora.LoraLayer)}


def product(state: AdapterState, path: str) -> np.ndarray:
    made: np.ndarray = state.tensors[f"{path}.B"] @ state.tensors[f"{path}.A"]
    return made


def assert_does_what(state: AdapterState, model: Any, tolerance: float = 1e-6) -> None:
    layers = adapted(model)
    assert {m.path for m in state.spec.modules if m.kind == "lora"} == layers.keys()
    for path, layer in layers.items():
        delta = layer.get_delta_weight("default").detach().float().numpy()
        upright = isinstance(layer.get_base_layer(), nn.Linear)
        np.testing.assert_allclose(
            product(state, path), delta if upright else delta.T, rtol=tolerance, atol=tolerance, err_msg=path
        )


@cases
def test_what_is_read_does_what_peft_does(name: str, tmp_path: Path) -> None:
    made = CASES[name]
    model = saved(made, tmp_path / "stock")
    stored = read_adapter_folder(tmp_path / "stock")
    assert_does_what(stored.state, model)
    for module in stored.state.spec.modules:
        if module.kind == "lora":
            layer = adapted(model)[module.path]
            assert (module.rank, module.scale) == (layer.r["default"], layer.scaling["default"])
    assert tuple(m.path for m in stored.state.spec.modules if m.kind == "full") == made.full
    assert stored.embeddings == set(made.embeddings)
    assert stored.config == json.loads((tmp_path / "stock" / CONFIG).read_bytes())
    stored.state.spec.require(stored.state.tensors, "read")


@cases
def test_what_is_written_is_loaded_by_peft_and_computes_the_same(name: str, tmp_path: Path) -> None:
    made = CASES[name]
    model = saved(made, tmp_path / "stock")
    stored = read_adapter_folder(tmp_path / "stock")
    write_adapter_folder(tmp_path / "own", stored.state, stored.config, stored.embeddings)
    # Warnings are errors here, and peft warns of each key that it misses.
    loaded = peft.PeftModel.from_pretrained(fresh(made.base), str(tmp_path / "own")).eval()
    torch.testing.assert_close(output(loaded), output(model), rtol=1e-5, atol=1e-5)
    assert adapted(loaded).keys() == adapted(model).keys()
    assert {layer.scaling["default"] for layer in adapted(loaded).values()} == {1.0}

    written = peft.utils.load_peft_weights(str(tmp_path / "own"), device="cpu")
    assert not peft.set_peft_model_state_dict(loaded, written).unexpected_keys
    taken = peft.get_peft_model_state_dict(loaded, **made.saving)
    assert written.keys() == taken.keys()
    assert all(torch.equal(written[key], taken[key]) for key in written)


@cases
def test_reading_what_was_written_gives_the_same_bits(name: str, tmp_path: Path) -> None:
    saved(CASES[name], tmp_path / "stock")
    stored = read_adapter_folder(tmp_path / "stock")
    write_adapter_folder(tmp_path / "own", stored.state, stored.config, stored.embeddings)
    again = read_adapter_folder(tmp_path / "own")
    assert again.embeddings == stored.embeddings
    assert_same(again.state, stored.state)


def assert_same(one: AdapterState, other: AdapterState) -> None:
    assert one.spec.shapes == other.spec.shapes
    for key, value in one.tensors.items():
        assert value.tobytes() == other.tensors[key].tobytes(), key


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_saved_in_other_precisions(dtype: torch.dtype, tmp_path: Path) -> None:
    model = trained(CASES["patterns"]).to(dtype)
    model.save_pretrained(str(tmp_path), save_embedding_layers=False)
    stored = safetensors.torch.load_file(str(tmp_path / WEIGHTS))
    assert {value.dtype for value in stored.values()} == {dtype}
    state = read_adapter_folder(tmp_path).state
    assert {value.dtype for value in state.tensors.values()} == {np.dtype(np.float32)}
    for key, value in stored.items():
        path = key.removeprefix("base_model.model.")
        if path.endswith("lora_A.weight"):
            own = state.tensors[path.removesuffix("lora_A.weight") + "A"]
            np.testing.assert_array_equal(own, value.float().numpy())
    # torch works in the narrow type here, and only then is the result made wide.
    assert_does_what(state, model.float())


def test_golden_numbers_of_each_precision(tmp_path: Path) -> None:
    # bfloat16 is the upper half of float32: 1.5 is 3FC0, -2 is C000, 0.15625 is 3E20. alpha / r = 6 / 2 = 3.
    a = np.array([0x3FC0, 0xC000], "<u2").tobytes()
    entries = {
        "base_model.model.m.lora_A.weight": ("BF16", [2, 1], a),
        "base_model.model.m.lora_B.weight": ("F16", [1, 2], np.array([0.5, 4], "<f2").tobytes()),
        "base_model.model.head.weight": ("F64", [1], np.array([0.1], "<f8").tobytes()),
        "base_model.model.head.bias": ("BF16", [], np.array([0x3E20], "<u2").tobytes()),
    }
    put(tmp_path, {**PLAIN, "r": 2, "lora_alpha": 6}, raw(entries))
    state = read_adapter_folder(tmp_path).state
    assert {key: value.tolist() for key, value in state.tensors.items()} == {
        "m.A": [[1.5], [-2.0]],
        "m.B": [[1.5, 12.0]],
        "head.weight": [float(np.float32(0.1))],
        "head.bias": 0.15625,
    }
    assert state.spec.modules == (
        ModuleSpec("head", "full", 0, 1.0, (("bias", ()), ("weight", (1,)))),
        ModuleSpec("m", "lora", 2, 3.0, (("A", (2, 1)), ("B", (1, 2)))),
    )


PLAIN: dict[str, Any] = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "base_model_name_or_path": "base"}
PREFIX = "base_model.model."


def raw(entries: Mapping[str, tuple[str, list[int], bytes]]) -> bytes:
    """A safetensors file, byte by byte."""
    header, at = {}, 0
    for key, (dtype, shape, data) in entries.items():
        header[key] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(data)]}
        at += len(data)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + b"".join(data for _, _, data in entries.values())


def put(folder: Path, config: Any, weights: bytes | Mapping[str, np.ndarray]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / CONFIG).write_text(config if isinstance(config, str) else json.dumps(config))
    data = weights if isinstance(weights, bytes) else safetensors.numpy.save(dict(weights))
    (folder / WEIGHTS).write_bytes(data)
    return folder


def pair(path: str = "m", rank: int = 1, inputs: int = 2, outputs: int = 3) -> dict[str, np.ndarray]:
    return {
        f"{PREFIX}{path}.lora_A.weight": np.ones((rank, inputs), np.float32),
        f"{PREFIX}{path}.lora_B.weight": np.ones((outputs, rank), np.float32),
    }


@pytest.mark.parametrize(
    ("config", "rank", "scale"),
    [
        ({"r": 4, "lora_alpha": 6}, 4, 1.5),
        ({"r": 4, "lora_alpha": 6, "use_rslora": True}, 4, 3.0),
        ({"r": None, "lora_alpha": 6, "rank_pattern": {"m": 2}}, 2, 3.0),
        ({"r": 4, "lora_alpha": 6, "rank_pattern": None, "alpha_pattern": None}, 4, 1.5),
        # The first pattern that matches counts, and it must match up to the end, from a dot or the beginning.
        ({"r": 4, "lora_alpha": 6, "alpha_pattern": {"b": 1, "a": 2, "b.m": 3, "m": 5}}, 4, 0.75),
        ({"r": 4, "lora_alpha": 6, "alpha_pattern": {"^m": 1, "a.b": 2, "m.": 4, "a.*m": 8}}, 4, 2.0),
    ],
)
def test_golden_scales(config: dict[str, Any], rank: int, scale: float, tmp_path: Path) -> None:
    put(tmp_path, {**PLAIN, **config}, pair("a.b.m", rank))
    state = read_adapter_folder(tmp_path).state
    (module,) = state.spec.modules
    assert (module.path, module.rank, module.scale) == ("a.b.m", rank, scale)
    np.testing.assert_array_equal(state.tensors["a.b.m.B"], np.full((3, rank), scale, np.float32))
    np.testing.assert_array_equal(state.tensors["a.b.m.A"], np.ones((rank, 2), np.float32))


def test_a_path_that_is_itself_a_key_needs_no_match(tmp_path: Path) -> None:
    """As a pattern "m+" is one or more of the letter m, which the name "m+" is not."""
    put(tmp_path, {**PLAIN, "lora_alpha": 6, "rank_pattern": {"m+": 3}}, pair("m+", 3))
    assert read_adapter_folder(tmp_path).state.spec.modules[0].scale == 2.0


def test_absent_settings_have_the_defaults_of_peft(tmp_path: Path) -> None:
    default = peft.LoraConfig()
    put(tmp_path, {"peft_type": "LORA"}, pair(rank=default.r))
    stored = read_adapter_folder(tmp_path)
    assert stored.state.spec.modules[0].scale == default.lora_alpha / default.r
    assert (stored.state.spec.base_model, stored.state.spec.family) == ("", "lora")


UNREADABLE = [
    ({"peft_type": "IA3"}, r"peft_type: expected LORA, found IA3"),
    ({"peft_type": None}, r"peft_type: expected LORA, found None"),
    ({"use_dora": True}, r"use_dora: expected plain LoRA, found .*DoRA"),
    ({"lora_bias": True}, r"lora_bias: expected plain LoRA, found biases"),
    ({"bias": "all"}, r"bias: expected none, found 'all'"),
    ({"bias": "lora_only"}, r"bias: expected none, found 'lora_only'"),
    ({"target_parameters": ["experts.gate"]}, r"target_parameters: expected plain LoRA"),
    ({"trainable_token_indices": [3]}, r"trainable_token_indices: expected plain LoRA"),
    ({"layer_replication": [[0, 2], [1, 3]]}, r"layer_replication: expected plain LoRA"),
    ({"alora_invocation_tokens": [1]}, r"alora_invocation_tokens: .*aLoRA"),
    ({"use_qalora": True}, r"use_qalora: .*QALoRA"),
    ({"use_bdlora": {"target_modules_bd_a": []}}, r"use_bdlora: .*BD-LoRA"),
    ({"monteclora_config": {"n": 1}}, r"monteclora_config: .*MonteCLoRA"),
    ({"arrow_config": {"top_k": 1}}, r"arrow_config: .*Arrow"),
    ({"kasa_config": {"beta": 1}}, r"kasa_config: .*KaSA"),
    *(
        ({"init_lora_weights": name}, rf"init_lora_weights: expected one that leaves the base .* found '{name}'; save")
        for name in ("pissa", "pissa_niter_4", "olora", "OLoRA", "corda", "lora_ga", "loftq")
    ),
    ({"rank_pattern": [1]}, r"rank_pattern or alpha_pattern: expected an object"),
    ({"alpha_pattern": {"(": 1}}, r"patterns: expected regular expressions, found .*unterminated"),
    ({"r": "1"}, r"rank of m: expected a whole number above 0, found 1"),
    ({"r": True}, r"rank of m: expected a whole number above 0, found True"),
    ({"rank_pattern": {"m": 0}}, r"rank of m: expected a whole number above 0, found 0"),
    ({"lora_alpha": None}, r"alpha of m: expected a finite number, found None"),
    ({"lora_alpha": math.inf}, r"alpha of m: expected a finite number, found inf"),
    ({"r": 2}, r"module m: expected factors .* of rank 2, as the configuration says, found \(1, 2\) and .*; correct"),
    ({"lora_alpha": 1e39}, r"module m, scaled B: expected finite numbers in float32, found NaN or infinity"),
    ("[1]", r"adapter_config.json: expected a JSON object, found list"),
    ('{"r": 1', r"adapter_config.json: expected JSON, found "),
    ("\udcff", r"adapter_config.json: expected JSON, found "),
]


@pytest.mark.parametrize(("change", "message"), UNREADABLE, ids=[str(change) for change, _ in UNREADABLE])
def test_configurations_that_are_refused(change: dict[str, Any] | str, message: str, tmp_path: Path) -> None:
    put(tmp_path, PLAIN, pair())
    assert product(read_adapter_folder(tmp_path).state, "m").tolist() == [[1.0, 1.0]] * 3
    text = change if isinstance(change, str) else json.dumps({**PLAIN, **change})
    (tmp_path / CONFIG).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(AdapterError, match=rf"^{re.escape(str(tmp_path))}.*{message}"):
        read_adapter_folder(tmp_path)


@pytest.mark.parametrize("initial", [True, False, None, "gaussian", "eva", "orthogonal", "mica"])
def test_starts_that_leave_the_base_alone_are_read(initial: object, tmp_path: Path) -> None:
    put(tmp_path, {**PLAIN, "init_lora_weights": initial}, pair())
    assert read_adapter_folder(tmp_path).state.spec.modules[0].rank == 1


@pytest.mark.filterwarnings("ignore:PiSSA changes the base weights:UserWarning")
def test_pissa_is_read_once_peft_has_made_it_plain(tmp_path: Path) -> None:
    """peft writes the difference from the start as an adapter of twice the rank, on the base as it was."""
    settings = {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    torch.manual_seed(1)
    model = peft.get_peft_model(fresh(llama), peft.LoraConfig(**settings, init_lora_weights="pissa"))
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(str(tmp_path / "start"), save_embedding_layers=False)
    model.peft_config["default"].init_lora_weights = "pissa"
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape), alpha=0.3)
    model.eval()
    moved = output(model)
    model.save_pretrained(
        str(tmp_path / "plain"),
        path_initial_model_for_weight_conversion=str(tmp_path / "start"),
        save_embedding_layers=False,
    )
    stored = read_adapter_folder(tmp_path / "plain")
    assert {m.rank for m in stored.state.spec.modules if m.kind == "lora"} == {4}
    write_adapter_folder(tmp_path / "own", stored.state, stored.config)
    loaded = peft.PeftModel.from_pretrained(fresh(llama), str(tmp_path / "own")).eval()
    torch.testing.assert_close(output(loaded), moved, rtol=1e-4, atol=1e-5)


A, B = f"{PREFIX}m.lora_A.weight", f"{PREFIX}m.lora_B.weight"


def ones(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return np.ones(shape, dtype)


BAD_TENSORS = [
    ({B: None}, r"module m: expected lora_A.weight and lora_B.weight or .*, found lora_A.weight"),
    ({A: None}, r"module m: expected lora_A.weight and lora_B.weight or .*, found lora_B.weight"),
    ({A: None, B: None}, r"expected the factors of at least one module, found 1 without any"),
    ({A: None, f"{PREFIX}m.lora_embedding_A": ones(1, 2)}, r"module m: expected .* found lora_B.weight, lora_embeddin"),
    ({f"{PREFIX}m.lora_B.bias": ones(3)}, r"module m: expected .* found lora_A.weight, lora_B.bias, lora_B.weight"),
    ({A: ones(1, 2, 1, 1)}, r"module m: expected factors with two axes, found \(1, 2, 1, 1\) and \(3, 1\)"),
    ({B: ones(3, 1, 1)}, r"module m: expected factors with two axes, found \(1, 2\) and \(3, 1, 1\)"),
    ({A: ones(0)}, r"module m: expected factors with two axes, found \(0,\)"),
    ({A: ones(2, 2)}, r"module m: expected factors .* of rank 1, .* found \(2, 2\) and \(3, 1\)"),
    ({B: ones(3, 2)}, r"module m: expected factors .* of rank 1, .* found \(1, 2\) and \(3, 2\)"),
    ({B: ones(1, 3)}, r"module m: expected factors .* of rank 1, .* found \(1, 2\) and \(1, 3\)"),
    ({A: ones(1, 2) * np.nan}, r"tensor .*lora_A.weight: expected finite numbers in float32, found NaN"),
    ({f"{PREFIX}head.weight": ones(1) * -np.inf}, r"tensor .*head.weight: expected finite numbers in float32"),
    ({B: ones(3, 1, dtype=np.float64) * 1e39}, r"tensor .*lora_B.weight: expected finite numbers in float32"),
    ({A: ones(1, 2, dtype=np.int8)}, r"tensor .*: expected one of F64, F32, F16, BF16, found I8; save"),
    ({f"{PREFIX}head.steps": ones(1, dtype=np.int64)}, r"tensor .*head.steps: expected one of .*, found I64"),
    ({f"{PREFIX}m.lora_magnitude_vector": ones(3)}, r"lora_magnitude_vector: expected the factors A and B alone"),
    ({f"{PREFIX}m.lora_diag.weight": ones(1)}, r"m.lora_diag.weight: expected the factors A and B alone"),
    ({"m.lora_A.weight": ones(1, 2)}, r"tensor m.lora_A.weight: expected a name that begins with base_model.model."),
    ({"base_model.model.weight": ones(1)}, r"tensor base_model.model.weight: expected a name that begins with base"),
    (pair("m.base_layer.out_proj"), r"out_proj.lora_A.weight: expected a layer of its own, found a part of one"),
]


@pytest.mark.parametrize(("change", "message"), BAD_TENSORS, ids=[message for _, message in BAD_TENSORS])
def test_tensors_that_are_refused(change: dict[str, np.ndarray | None], message: str, tmp_path: Path) -> None:
    whole = {**pair(), f"{PREFIX}head.weight": ones(2)}
    read_adapter_folder(put(tmp_path, PLAIN, whole))
    changed = {key: value for key, value in {**whole, **change}.items() if value is not None}
    put(tmp_path, PLAIN, changed)
    with pytest.raises(AdapterError, match=rf"^{re.escape(str(tmp_path / WEIGHTS))}.*{message}"):
        read_adapter_folder(tmp_path)


def test_eight_bit_floats_are_refused(tmp_path: Path) -> None:
    entries = {A: ("F8_E4M3", [1, 2], b"11"), B: ("F32", [3, 1], bytes(12))}
    with pytest.raises(AdapterError, match=r"lora_A.weight: expected one of F64, F32, F16, BF16, found F8_E4M3"):
        read_adapter_folder(put(tmp_path, PLAIN, raw(entries)))


@pytest.mark.parametrize("kept", [0, 7, 8, 60, -1])
def test_a_truncated_file_is_refused(kept: int, tmp_path: Path) -> None:
    whole = safetensors.numpy.save(pair())
    put(tmp_path, PLAIN, whole[:kept])
    with pytest.raises(AdapterError, match=rf"{WEIGHTS}: expected a whole safetensors file, found .*; copy or save"):
        read_adapter_folder(tmp_path)


def test_missing_folders_and_files_are_named(tmp_path: Path) -> None:
    absent = tmp_path / "absent"
    with pytest.raises(AdapterError, match=rf"absent/{CONFIG}: expected a file, found No such file .*; name a folder"):
        read_adapter_folder(absent)
    folder = put(tmp_path / "here", PLAIN, pair())
    (folder / WEIGHTS).unlink()
    with pytest.raises(AdapterError, match=rf"{WEIGHTS}: expected a file, found No such file .*; name a folder"):
        read_adapter_folder(folder)
    (folder / WEIGHTS).mkdir()
    with pytest.raises(AdapterError, match=rf"{WEIGHTS}: expected a file, found Is a directory"):
        read_adapter_folder(folder)


def test_a_pickle_is_refused_unread(tmp_path: Path) -> None:
    model = trained(CASES["head"])
    model.save_pretrained(str(tmp_path), safe_serialization=False, save_embedding_layers=False)
    assert (tmp_path / "adapter_model.bin").exists()
    with pytest.raises(AdapterError, match=r"found adapter_model.bin, a pickle; save it again with safe_serializ"):
        read_adapter_folder(tmp_path)
    # Beside tensors it is left alone.
    model.save_pretrained(str(tmp_path), save_embedding_layers=False)
    assert_does_what(read_adapter_folder(tmp_path).state, model)


def lora_state(shapes: Mapping[str, tuple[int, int, int]], full: Mapping[str, tuple[int, ...]] = {}) -> AdapterState:
    """A random adapter with modules of (rank, in, out) by path, and whole tensors by key."""
    modules, random = [], np.random.default_rng(7)
    for path, (rank, inputs, outputs) in shapes.items():
        modules.append(ModuleSpec(path, "lora", rank, 1.0, (("A", (rank, inputs)), ("B", (outputs, rank)))))
    for key, shape in full.items():
        path, _, name = key.rpartition(".")
        modules.append(ModuleSpec(path, "full", 0, 1.0, ((name, shape),)))
    spec = AdapterSpec("base", "lora", tuple(sorted(modules, key=lambda m: (m.path, m.kind))))
    # In Fortran order, which a file must not show.
    return AdapterState(
        spec, {key: np.asarray(random.normal(size=s), np.float32, order="F") for key, s in spec.shapes.items()}
    )


part = st.text("abz019_+$^(", min_size=1, max_size=4)
paths = st.lists(part, min_size=1, max_size=3).map(".".join)
sizes = st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))


@settings(max_examples=40)
@given(shapes=st.dictionaries(paths, sizes, min_size=1, max_size=5), data=st.data())
def test_any_adapter_comes_back_as_it_was_written(shapes: dict[str, tuple[int, int, int]], data: st.DataObject) -> None:
    state = lora_state(shapes, {"heads.one.weight": (2, 3), "heads.one.bias": ()})
    embeddings = data.draw(st.sets(st.sampled_from(sorted(shapes))))
    with tempfile.TemporaryDirectory() as root:
        write_adapter_folder(Path(root) / "own", state, {}, embeddings)
        again = read_adapter_folder(Path(root) / "own")
    assert_same(again.state, state)
    assert again.embeddings == embeddings
    assert {m.scale for m in again.state.spec.modules} == {1.0}
    assert {m.path: m.rank for m in again.state.spec.modules if m.kind == "lora"} == {
        p: s[0] for p, s in shapes.items()
    }


def test_golden_configuration(tmp_path: Path) -> None:
    state = lora_state({"a.q": (2, 3, 3), "a.v+": (4, 3, 3), "b.q": (2, 3, 3)}, {"top.classifier.weight": (2,)})
    like = {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS",
        "base_model_name_or_path": "some/base",
        "revision": "r1",
        "fan_in_fan_out": True,
        "lora_dropout": 0.1,
        "auto_mapping": None,
        "modules_to_save": ["score", "classifier"],
        "r": 9,
        "lora_alpha": 7,
        "rank_pattern": {"q": 5},
        "use_rslora": True,
        "target_modules": ["k"],
        "exclude_modules": ["a"],
        "layers_to_transform": [3],
        "layers_pattern": "h",
        "init_lora_weights": "eva",
        "eva_config": {"rho": 2.0},
        "ensure_weight_tying": True,
        "inference_mode": False,
    }
    write_adapter_folder(tmp_path / "own", state, like)
    assert json.loads((tmp_path / "own" / CONFIG).read_text()) == {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS",
        "base_model_name_or_path": "some/base",
        "revision": "r1",
        "fan_in_fan_out": True,
        "lora_dropout": 0.1,
        "auto_mapping": None,
        "modules_to_save": ["classifier"],
        "r": 4,
        "lora_alpha": 4,
        "rank_pattern": {"^a\\.q": 2, "^b\\.q": 2},
        "alpha_pattern": {"^a\\.q": 2, "^b\\.q": 2},
        "use_rslora": False,
        "bias": "none",
        "init_lora_weights": True,
        "inference_mode": True,
        "target_modules": ["a.q", "a.v+", "b.q"],
    }
    assert sorted(path.name for path in (tmp_path / "own").iterdir()) == [CONFIG, WEIGHTS]
    with safetensors.safe_open(tmp_path / "own" / WEIGHTS, "numpy") as file:
        assert file.metadata() == {"format": "pt"}
    assert sorted(safetensors.numpy.load_file(tmp_path / "own" / WEIGHTS)) == [
        "base_model.model.a.q.lora_A.weight",
        "base_model.model.a.q.lora_B.weight",
        "base_model.model.a.v+.lora_A.weight",
        "base_model.model.a.v+.lora_B.weight",
        "base_model.model.b.q.lora_A.weight",
        "base_model.model.b.q.lora_B.weight",
        "base_model.model.top.classifier.weight",
    ]


def test_a_path_of_one_part_is_targeted_by_a_pattern_of_whole_paths(tmp_path: Path) -> None:
    write_adapter_folder(tmp_path / "own", lora_state({"m+": (1, 2, 2), "a.m": (1, 2, 2)}), {})
    targets = json.loads((tmp_path / "own" / CONFIG).read_text())["target_modules"]
    assert targets == r"a\.m|m\+"


def test_a_module_of_rank_zero_is_left_out(tmp_path: Path) -> None:
    made = CASES["embedding with its base"]
    saved(made, tmp_path / "stock")
    stored = read_adapter_folder(tmp_path / "stock")
    state = stored.state
    spec = at_ranks(state.spec, {"model.embed_tokens": 0, "model.layers.1.self_attn.q_proj": 0})
    less = AdapterState(spec, resized(state.tensors, spec))
    zeroed = ("model.embed_tokens.B", "model.layers.1.self_attn.q_proj.B")
    zeros = {key: np.zeros_like(value) if key in zeroed else value for key, value in state.tensors.items()}
    write_adapter_folder(tmp_path / "less", less, stored.config, stored.embeddings)
    write_adapter_folder(tmp_path / "zeros", replace(state, tensors=zeros), stored.config, stored.embeddings)
    one, other = (
        peft.PeftModel.from_pretrained(fresh(made.base), str(tmp_path / name)).eval() for name in ("less", "zeros")
    )
    assert adapted(one).keys() == {"lm_head", "model.layers.0.self_attn.q_proj"}
    weights = peft.utils.load_peft_weights(str(tmp_path / "less"), device="cpu")
    assert not peft.set_peft_model_state_dict(one, weights).unexpected_keys
    torch.testing.assert_close(output(one), output(other), rtol=1e-5, atol=1e-5)
    with pytest.raises(AdapterError, match=r"none: expected an adapter with a module of rank 1 or more, found none"):
        write_adapter_folder(tmp_path / "none", lora_state({"a.m": (0, 2, 2)}), {})
    assert not (tmp_path / "none").exists()


def test_a_module_that_is_not_saved_apart_is_loaded_into_the_base(tmp_path: Path) -> None:
    """Where `like` does not name a head, the base's own head takes the values."""
    model = saved(CASES["module to save"], tmp_path / "stock")
    stored = read_adapter_folder(tmp_path / "stock")
    write_adapter_folder(tmp_path / "own", stored.state, {**stored.config, "modules_to_save": None})
    loaded = peft.PeftModel.from_pretrained(fresh(llama), str(tmp_path / "own")).eval()
    torch.testing.assert_close(output(loaded), output(model), rtol=1e-5, atol=1e-5)


def test_a_residual_is_written_into_the_factors(tmp_path: Path) -> None:
    state = lora_state({"a.m": (2, 3, 4), "a.n": (2, 3, 4)})
    beside = lora_state({"a.m": (3, 3, 4)})
    write_adapter_folder(tmp_path / "own", replace(state, residual=beside.tensors), {})
    again = read_adapter_folder(tmp_path / "own").state
    assert [module.rank for module in again.spec.modules] == [5, 2]
    np.testing.assert_allclose(product(again, "a.m"), product(state, "a.m") + product(beside, "a.m"), rtol=1e-5)
    np.testing.assert_array_equal(product(again, "a.n"), product(state, "a.n"))


def test_three_factors_are_written_as_two(tmp_path: Path) -> None:
    shapes = {"A": (2, 3), "B": (4, 2), "R": (2, 2)}
    spec = AdapterSpec("base", "lora_sb", (ModuleSpec("a.m", "lora_sb", 2, 1.0, tuple(shapes.items())),))
    random = np.random.default_rng(5)
    state = AdapterState(spec, {key: random.normal(size=s).astype(np.float32) for key, s in spec.shapes.items()})
    write_adapter_folder(tmp_path / "own", state, {})
    again = read_adapter_folder(tmp_path / "own").state
    t = state.tensors
    np.testing.assert_allclose(product(again, "a.m"), t["a.m.B"] @ t["a.m.R"] @ t["a.m.A"], rtol=1e-5)


def other_kind(kind: str, tensors: Mapping[str, tuple[int, ...]]) -> AdapterState:
    spec = AdapterSpec("base", kind, (ModuleSpec("a.m", kind, 0, 1.0, tuple(tensors.items())),))
    return AdapterState(spec, {key: np.ones(shape, np.float32) for key, shape in spec.shapes.items()})


UNWRITABLE = [
    (other_kind("ia3", {"l": (3,)}), {}, r"module a.m: expected factors A and B, found kind ia3 with l"),
    (other_kind("lora", {"B": (3, 1)}), {}, r"module a.m: expected factors A and B, found kind lora with B"),
    (other_kind("full", {"weight": (3,)}), {}, r"expected an adapter with a module of rank 1 or more, found none"),
    (
        lora_state({"a.head": (1, 2, 2)}, {"a.head.weight": (2, 2)}),
        {},
        r"module a.head: expected low-rank factors or a module trained whole, found both; give all",
    ),
    (
        lora_state({"a.head.one": (1, 2, 2)}, {"a.head.two.weight": (2, 2)}),
        {"modules_to_save": ["head"]},
        r"module a.head.one: expected low-rank factors or a module trained whole, found both; give all",
    ),
    (replace(s := lora_state({"a.m": (1, 2, 2)}), tensors={}), {}, r"expected the 2 tensors of the specification"),
    (
        replace(s, tensors={k: v * np.float32(np.nan) for k, v in s.tensors.items()}),
        {},
        r"tensor a.m.A: expected finite numbers",
    ),
]


@pytest.mark.parametrize(("state", "like", "message"), UNWRITABLE, ids=[message for _, _, message in UNWRITABLE])
def test_states_that_are_not_written(state: AdapterState, like: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=message):
        write_adapter_folder(tmp_path / "own", state, like)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    state = lora_state({"a.m": (1, 2, 2)})
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "notes").write_text("mine")
    for path in (taken, taken / "notes"):
        with pytest.raises(AdapterError, match=r"expected no such folder yet, or an empty one, found something there"):
            write_adapter_folder(path, state, {})
    assert (taken / "notes").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    write_adapter_folder(tmp_path / "empty", state, {})
    assert_same(read_adapter_folder(tmp_path / "empty").state, state)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "taken"]


def limited(tmp_path: Path, limit: int) -> None:
    """Writes an adapter of which no file may grow past `limit` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        write_adapter_folder(tmp_path / "own", lora_state({"a.m": (1, 999, 2)}), {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("limit", [10, 2000])
def test_a_full_disk_leaves_nothing(limit: int, tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match=r"own: expected room to write it, found .*File too large"):
        limited(tmp_path, limit)
    assert not list(tmp_path.iterdir())


def test_torch_is_not_needed(tmp_path: Path) -> None:
    put(tmp_path / "one", PLAIN, pair())
    program = (
        "import sys; from pathlib import Path\n"
        "from fedpeft.adapter_folders import read_adapter_folder, write_adapter_folder\n"
        "root = Path(sys.argv[1]); one = read_adapter_folder(root / 'one')\n"
        "write_adapter_folder(root / 'two', one.state, one.config)\n"
        "sys.exit(', '.join({'torch', 'peft', 'transformers'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "two" / WEIGHTS).exists()
