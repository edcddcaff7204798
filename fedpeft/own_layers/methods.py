"""The methods by name: what settings each takes, and what it puts where.

Sources: Ben Zaken et al. 2022, "BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked
Language-models"; Houlsby et al. 2019, "Parameter-Efficient Transfer Learning for NLP", section 2.1; Pfeiffer et al.
2021, "AdapterFusion: Non-Destructive Task Composition for Transfer Learning", whose adapter this is; He et al. 2022,
"Towards a Unified View of Parameter-Efficient Transfer Learning", the parallel adapter on the feed-forward network (its
MAM adapter is `parallel` beside prefix tuning); Chen et al. 2022, "AdaptFormer: Adapting Vision Transformers for
Scalable Visual Recognition", which is `parallel` with a scale of 0.1 on a ViT; Lian et al. 2022, "Scaling & Shifting
Your Features: A New Baseline for Efficient Model Tuning".

What differs: dropout of the base on a sub-layer's output comes after a serial adapter here, not before; where the base
normalises before each sub-layer, `pfeiffer` reads the feed-forward network's output alone, having no later norm to read
from; `ssf` leaves out norms that have no bias, since no shift would merge into one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from fedpeft.own_layers.layers import BeforeNorm, OwnLayer, Parallel, ParallelTail, Prompted, Serial
from fedpeft.own_layers.places import patch_embeddings

BOTTLENECK: tuple[str, ...] = ("down.weight", "down.bias", "up.weight", "up.bias")
"""The tensors of a bottleneck: (size, width), (size,), (width, size), (width,)."""

Placement = tuple[tuple[str, type[OwnLayer]], ...]
"""The parts of an architecture that get a layer, and which."""


@dataclass(frozen=True)
class Method:
    """What a method takes and where it goes.

    `settings` are the settings that it takes, at their defaults. `tensors` are the names of the tensors that each
    `fedpeft_<name>` holds; a method with none trains parameters of the base instead. `placements` are alternatives:
    the first is used whose parts the architecture has. `unnamed` is the layer for a module that only
    `target_modules` names, or that `find` finds in the base. A method that `masks` trains some numbers of the base,
    which are chosen when it is there. `merges` says whether the base's weights can take it up.
    """

    name: str
    settings: Mapping[str, Any]
    tensors: tuple[str, ...] = ()
    placements: tuple[Placement, ...] = ()
    unnamed: type[OwnLayer] = Serial
    find: Callable[[Mapping[str, nn.Module]], list[str]] | None = None
    merges: bool = False
    masks: bool = False

    @property
    def adds_layers(self) -> bool:
        """Whether it adds tensors to the base, and does not train what is there."""
        return bool(self.tensors)


_WHERE: Mapping[str, Any] = {"layers": (), "target_modules": ()}
_SIZED: Mapping[str, Any] = {"bottleneck": 0, "reduction": 16, "scale": 1.0, "activation": "relu", **_WHERE}

OWN: Mapping[str, Method] = {
    "bitfit": Method("bitfit", {"biases": (), **_WHERE}, merges=True),
    "layer_norm": Method("layer_norm", _WHERE, merges=True),
    "houlsby": Method(
        "houlsby",
        {**_SIZED, "activation": "gelu"},
        BOTTLENECK,
        ((("attention_output", Serial), ("ffn_output", Serial)),),
    ),
    "pfeiffer": Method("pfeiffer", _SIZED, BOTTLENECK, ((("ffn_norm", BeforeNorm),), (("ffn_output", Serial),))),
    "parallel": Method(
        "parallel",
        {**_SIZED, "scale": 4.0},
        BOTTLENECK,
        ((("ffn_tail", ParallelTail),), (("ffn", Parallel),)),
        Parallel,
    ),
    "ssf": Method("ssf", _WHERE, ("scale", "shift"), merges=True),
    "fish_mask": Method("fish_mask", {"share": 0.005, "balanced": False, **_WHERE}, merges=True, masks=True),
    "child_tuning": Method("child_tuning", {"share": 0.1, "balanced": False, **_WHERE}, merges=True, masks=True),
    "visual_prompt": Method("visual_prompt", {"tokens": 10}, ("vectors",), unnamed=Prompted, find=patch_embeddings),
}
"""Every method, by name."""
