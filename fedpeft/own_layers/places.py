"""Where in a base a method goes: the parts of the architectures that are known, found by their modules' names.

A layer of a base is an entry of a list of modules, so the first number in a module's path counts the layers, and what
follows it is the path within the layer. That path, as a pattern of `fnmatch`, is what the table gives.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from fedpeft.errors import ModelError, sentence
from fedpeft.own_layers.layers import PREFIX, canonical, innermost

Roles = Mapping[str, tuple[str, ...]]
"""Patterns of paths within a layer by the part that the modules play:

- `attention_output` and `ffn_output` make a sub-layer's output, before it is added to its input;
- `ffn` is the whole feed-forward network, or `ffn_tail` the end of one that has no module of its own;
- `ffn_norm` normalises the sum of the feed-forward network's output and its input.
"""

ARCHITECTURES: Mapping[str, Roles] = {
    "BERT": {
        "attention_output": ("attention.output.dense", "crossattention.output.dense"),
        "ffn_output": ("output.dense",),
        "ffn_tail": ("output",),
        "ffn_norm": ("output.LayerNorm",),
    },
    "DistilBERT": {
        "attention_output": ("attention.out_lin",),
        "ffn_output": ("ffn.lin2",),
        "ffn": ("ffn",),
        "ffn_norm": ("output_layer_norm",),
    },
    "Llama": {"attention_output": ("self_attn.o_proj",), "ffn_output": ("mlp.down_proj",), "ffn": ("mlp",)},
    "ViT": {"attention_output": ("attention.o_proj",), "ffn_output": ("mlp.fc2",), "ffn": ("mlp",)},
    "DINOv2 with SwiGLU": {
        "attention_output": ("attention.o_proj",),
        "ffn_output": ("mlp.down_proj",),
        "ffn": ("mlp",),
    },
    "T5": {
        "attention_output": ("layer.*.SelfAttention.o", "layer.*.EncDecAttention.o"),
        "ffn_output": ("layer.*.DenseReluDense.wo",),
        "ffn": ("layer.*.DenseReluDense",),
    },
    "GPT-2": {
        "attention_output": ("attn.c_proj", "crossattention.c_proj"),
        "ffn_output": ("mlp.c_proj",),
        "ffn": ("mlp",),
    },
}
"""What plays which part, by name of the architecture and all that are built like it."""

_TELLING = ("attention_output", "ffn_output")
"""The parts by which an architecture is known: each has at least one module in the base."""


def body(base: nn.Module) -> dict[str, nn.Module]:
    """The modules of `base` less the task's own head, by path; a layer of ours stands for what it wraps."""
    prefix = getattr(base, "base_model_prefix", "")
    within = f"{prefix}." if isinstance(getattr(base, prefix, None) if prefix else None, nn.Module) else ""
    outputs: Any = getattr(base, "get_output_embeddings", lambda: None)()
    found: dict[str, nn.Module] = {}
    known: set[str] = set()
    for path, module in base.named_modules():
        name = canonical(path)
        if path.startswith(within) and path and PREFIX not in path and module is not outputs and name not in known:
            known.add(name)
            found[path] = module
    return found


def named(modules: Mapping[str, nn.Module], suffixes: Sequence[str], method: str) -> list[str]:
    """The paths in `modules` whose last components are one of `suffixes`.

    Raises:
        ModelError: a suffix matches nothing.
    """
    found: set[str] = set()
    for suffix in suffixes:
        hits = [path for path in modules if f".{canonical(path)}".endswith(f".{suffix}")]
        if not hits:
            raise ModelError(
                sentence(
                    f"adapter.{method}.target_modules",
                    expected="names of modules that the base has",
                    found=repr(suffix),
                    remedy="name others",
                )
            )
        found.update(hits)
    return [path for path in modules if path in found]


def in_layers(paths: Sequence[str], layers: Sequence[int], method: str) -> list[str]:
    """Those of `paths` that are in one of `layers`; all, where none is named.

    Raises:
        ModelError: there is nothing in a layer that is named.
    """
    counted = {path: _layer(path) for path in paths}
    for layer in layers:
        if layer not in counted.values():
            have = sorted({at for at in counted.values() if at is not None})
            raise ModelError(
                sentence(
                    f"adapter.{method}.layers",
                    expected=f"some of the layers that it fits, {have[0]} to {have[-1]}" if have else "none",
                    found=layer,
                    remedy="name those, or none for all",
                )
            )
    return [path for path in paths if not layers or counted[path] in layers]


def roles_of(modules: Mapping[str, nn.Module], base: nn.Module, method: str) -> Roles:
    """The table's row that `base` is built like.

    Raises:
        ModelError: there is none.
    """
    for roles in ARCHITECTURES.values():
        if all(playing(modules, roles[role]) for role in _TELLING):
            return roles
    raise ModelError(
        sentence(
            f"adapter.{method}",
            expected=f"a base built like {', '.join(ARCHITECTURES)}",
            found=type(base).__name__,
            remedy="name the modules that make each sub-layer's output in target_modules",
        )
    )


def playing(modules: Mapping[str, nn.Module], patterns: Sequence[str]) -> list[str]:
    """The paths in `modules` that match one of `patterns` within their layer."""
    return [path for path in modules if any(fnmatchcase(_within(path), pattern) for pattern in patterns)]


def scalable(modules: Mapping[str, nn.Module]) -> list[str]:
    """The paths of the linear layers, convolutions and norms with a bias: what a scale and a shift merge into."""
    return [path for path, module in modules.items() if _is_scalable(innermost(module))]


def patch_embeddings(modules: Mapping[str, nn.Module]) -> list[str]:
    """The paths of the modules that make vectors of an image's patches, with one before them that stands for all."""
    inner = ((path, innermost(module)) for path, module in modules.items())
    return [path for path, module in inner if hasattr(module, "patch_embeddings") and hasattr(module, "cls_token")]


def norms(modules: Mapping[str, nn.Module]) -> list[str]:
    """The paths of the norms over features."""
    return [path for path, module in modules.items() if _is_norm(innermost(module))]


def _is_scalable(module: nn.Module) -> bool:
    is_norm = isinstance(module, nn.LayerNorm) and module.bias is not None
    is_transposed = hasattr(module, "nf") and hasattr(module, "nx")
    return is_norm or is_transposed or isinstance(module, nn.Linear | nn.Conv2d)


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.LayerNorm) or type(module).__name__.endswith("Norm")


def _components(path: str) -> Iterator[tuple[int, str]]:
    return enumerate(canonical(path).split("."))


def _layer(path: str) -> int | None:
    return next((int(part) for _, part in _components(path) if part.isdigit()), None)


def _within(path: str) -> str:
    at = next((at for at, part in _components(path) if part.isdigit()), None)
    return "" if at is None else ".".join(canonical(path).split(".")[at + 1 :])
