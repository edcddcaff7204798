"""Adapters: what they are, and one module for each family."""

from fedpeft.adapters.family import Family
from fedpeft.adapters.head import head_only
from fedpeft.adapters.ia3 import ia3
from fedpeft.adapters.lora import lora
from fedpeft.adapters.lora_sb import lora_sb
from fedpeft.adapters.prompt import prompt_tuning
from fedpeft.adapters.ranks import (
    RANK_AXES,
    Factors,
    absorbed,
    as_lora,
    at_rank,
    at_ranks,
    factors,
    fit,
    fixed,
    greatest_rank,
    low_rank_modules,
    resized,
)
from fedpeft.adapters.spec import (
    AdapterSpec,
    AdapterState,
    ModuleSpec,
    Tensors,
    norm,
    spec_from_fields,
    spec_to_fields,
)

__all__ = [
    "RANK_AXES",
    "AdapterSpec",
    "AdapterState",
    "Factors",
    "Family",
    "ModuleSpec",
    "Tensors",
    "absorbed",
    "as_lora",
    "at_rank",
    "at_ranks",
    "factors",
    "fit",
    "fixed",
    "greatest_rank",
    "head_only",
    "ia3",
    "lora",
    "lora_sb",
    "low_rank_modules",
    "norm",
    "prompt_tuning",
    "resized",
    "spec_from_fields",
    "spec_to_fields",
]
