"""Adapters: what they are, and one module for each family."""

from fedpeft.adapters.algebra import Factors
from fedpeft.adapters.family import OWN_KINDS, Family, own_family, peft_family, together
from fedpeft.adapters.head import head_only
from fedpeft.adapters.ia3 import ia3
from fedpeft.adapters.kinds import EXACT, INEXACT, KINDS, PRODUCT, Kind
from fedpeft.adapters.lora import lora
from fedpeft.adapters.lora_sb import lora_sb
from fedpeft.adapters.prompt import prompt_tuning
from fedpeft.adapters.ranks import (
    RANK_AXES,
    absorbed,
    as_lora,
    at_rank,
    at_ranks,
    factors,
    fit,
    fixed,
    greatest_rank,
    inexact,
    low_rank_modules,
    rank_of,
    ranks_of,
    resizable,
    resized,
    solved,
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
    "EXACT",
    "INEXACT",
    "KINDS",
    "OWN_KINDS",
    "PRODUCT",
    "RANK_AXES",
    "AdapterSpec",
    "AdapterState",
    "Factors",
    "Family",
    "Kind",
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
    "inexact",
    "lora",
    "lora_sb",
    "low_rank_modules",
    "norm",
    "own_family",
    "peft_family",
    "prompt_tuning",
    "rank_of",
    "ranks_of",
    "resizable",
    "resized",
    "solved",
    "spec_from_fields",
    "spec_to_fields",
    "together",
]
