"""What peft is asked before it installs an adapter, and what its errors come to in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import fields
from difflib import get_close_matches
from typing import Any

import peft
from peft.utils import ModulesToSaveWrapper
from torch import nn

from fedpeft.adapters import Family
from fedpeft.errors import ModelError, sentence

_PROMPTS = ("PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING", "ADAPTION_PROMPT")
"""peft's types that put vectors before what the model reads."""


_QUERY_AND_VALUE = (("query", "value"), ("q_proj", "v_proj"), ("q", "v"), ("q_lin", "v_lin"), ("c_attn",))
"""What attention's queries and values are called, by model."""

_SCALED = (
    (("key", "value"), "output.dense"),
    (("key", "value"), "fc2"),
    (("k_proj", "v_proj"), "down_proj"),
    (("k_proj", "v_proj"), "fc2"),
    (("k", "v"), "wo"),
    (("k_lin", "v_lin"), "lin2"),
)
"""What attention's keys and values, and the last layer of the feed-forward network, are called, by model."""


def scale_of(layer: Any) -> float:
    """What a peft layer multiplies the product of its factors by."""
    scale = float(layer.scaling["default"])
    counted = getattr(layer, "ranknum", None)
    return scale / (float(counted["default"]) + 1e-5) if counted is not None else scale  # as AdaLoRA computes it


def require_arguments(arguments: Mapping[str, Any], family: Family) -> None:
    """Raises ModelError for an argument that peft's configuration of this family does not have."""
    config = peft.PEFT_TYPE_TO_CONFIG_MAPPING[arguments["peft_type"]]
    known = {item.name for item in fields(config)}
    if arguments.get("target_modules") == "all-linear" and "exclude_modules" in arguments.keys() - known:
        raise ModelError(
            sentence(
                f"adapter.{family.name}.target_modules",
                expected="names of modules, because peft cannot leave the task's own last layer out for this family",
                found="'all-linear'",
                remedy="name them",
            )
        )
    for name in arguments:
        if name not in known and arguments[name] is not None:
            near = get_close_matches(name, known, n=1, cutoff=0.0)[0]
            raise ModelError(
                sentence(
                    f"adapter.{family.name}.options",
                    expected=f"a setting of peft's {config.__name__}",
                    found=repr(name),
                    remedy=f"the nearest is {near!r}",
                )
            )


def unload(model: Any) -> Any:
    """The base with peft's adapter merged into its weights, and in it what was trained whole.

    LayerNorm tuning leaves the wrappers of what was trained whole where they are.
    """
    merged = model.merge_and_unload()
    for path, module in list(merged.named_modules()):
        if isinstance(module, ModulesToSaveWrapper):
            parent, _, name = path.rpartition(".")
            setattr(merged.get_submodule(parent), name, module.modules_to_save["default"])
    return merged


def makes_heads(arguments: Mapping[str, Any]) -> bool:
    """Whether peft trains the last layer of a task that it knows though the family has no such setting."""
    return arguments["peft_type"] in _PROMPTS


def require_heads(arguments: Mapping[str, Any], family: Family) -> None:
    """Raises ModelError where peft cannot train the task's own last layer beside this family."""
    config = peft.PEFT_TYPE_TO_CONFIG_MAPPING[arguments["peft_type"]]
    if "modules_to_save" not in {item.name for item in fields(config)}:
        raise ModelError(
            sentence(
                f"adapter.{family.name}",
                expected="a family beside which a task's own last layer can be trained",
                found="one that peft has for language models only",
                remedy="choose lora, ia3 or another that changes weights",
            )
        )


def usual_targets(base: nn.Module, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What to adapt of a model for which peft has no choice, or one that no longer holds; empty where we have none."""
    if arguments["peft_type"] in _PROMPTS or arguments.get("target_modules"):
        return {}
    there = set(_names(base))
    if arguments["peft_type"] == "LN_TUNING":
        named = base.named_modules()
        norms = {name.rpartition(".")[2] for name, module in named if "norm" in type(module).__name__.lower()}
        return {"target_modules": sorted(norms)} if norms else {}
    if arguments["peft_type"] == "IA3":
        for names, forward in _SCALED:
            if {*names, forward.rpartition(".")[2]} <= there:
                return {"target_modules": [*names, forward], "feedforward_modules": [forward]}
        return {}
    found = next((names for names in _QUERY_AND_VALUE if set(names) <= there), ())
    return {"target_modules": list(found)} if found else {}


def require_known(name: str, kind: str, twice: bool, family: Family) -> None:
    """Raises ModelError for a trained tensor of peft's that the family does not know, which an option has added.

    Such a one would be averaged as if it were a weight of the model. `twice` says that the module has one of its name.
    """
    parts = name.split(".")
    stranger = kind == "full" and "default" in parts and "modules_to_save" not in parts
    if stranger or (twice and family.peft and kind == family.kind != "encoded" and not parts[-1].isdigit()):
        raise ModelError(
            sentence(
                f"adapter.{family.name}.options",
                expected="options that add no tensors to the method's own",
                found=f"{name} to be trained",
                remedy="leave that option out (DoRA is dora = true)",
            )
        )


def refusal(base: nn.Module, family: Family, arguments: Mapping[str, Any], error: Exception) -> ModelError:
    """The error in words: which modules there are, or that the model cannot have such an adapter at all."""
    place = f"adapter.{family.name}"
    if "gradient checkpointing" in str(error).lower():
        return ModelError(
            sentence(
                place,
                expected="layers that keep what they gave, in which the vectors stand",
                found="model.gradient_checkpointing=true",
                remedy="set it to false, or choose lora",
            )
        )
    if arguments["peft_type"] in _PROMPTS:
        return ModelError(
            sentence(
                place,
                expected="a language model that reads vectors before its input",
                found=type(base).__name__,
                remedy="choose a family that changes weights, such as lora or ia3",
            )
        )
    wanted = arguments.get("target_modules")
    wanted = [wanted] if isinstance(wanted, str) else list(wanted or ())
    there = _names(base)
    lacking = [name for name in wanted if name != "all-linear" and name.rpartition(".")[2] not in there]
    if lacking:
        near = get_close_matches(lacking[0], there, n=3, cutoff=0.0)
        return ModelError(
            sentence(
                f"{place}.target_modules",
                expected=f"modules of {type(base).__name__}",
                found=repr(lacking[0]),
                remedy=f"the nearest are {', '.join(near)}",
            )
        )
    first = (str(error).splitlines() or [type(error).__name__])[0]
    if first.startswith("Target module ") and "(" in first:
        return ModelError(
            sentence(
                f"{place}.target_modules",
                expected="modules that this family can be put on",
                found=first.removeprefix("Target module ").partition("(")[0],
                remedy="name others, or leave out the method that is on them already",
            )
        )
    return ModelError(
        sentence(
            place,
            expected=f"settings that fit {type(base).__name__}",
            found=first,
            remedy=f"name target_modules that this model has, such as {', '.join(there[:6])}",
        )
    )


def _names(base: nn.Module) -> list[str]:
    """The last components of the paths of modules that hold a matrix, the most frequent first."""
    named = base.named_modules()
    counts = Counter(
        name.removesuffix(".base_layer").rpartition(".")[2]
        for name, module in named
        if getattr(getattr(module, "weight", None), "ndim", 0) == 2
    )
    return [name for name, _ in counts.most_common()]
