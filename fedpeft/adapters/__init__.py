"""Adapters: what they are, and one module for each family."""

from fedpeft.adapters.family import Family
from fedpeft.adapters.head import head_only
from fedpeft.adapters.ia3 import ia3
from fedpeft.adapters.lora import lora
from fedpeft.adapters.prompt import prompt_tuning
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
    "AdapterSpec",
    "AdapterState",
    "Family",
    "ModuleSpec",
    "Tensors",
    "head_only",
    "ia3",
    "lora",
    "norm",
    "prompt_tuning",
    "spec_from_fields",
    "spec_to_fields",
]
