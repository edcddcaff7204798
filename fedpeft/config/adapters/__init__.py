"""Settings of the adapter families, and the table of their names."""

from fedpeft.config.adapters.low_rank import Lora, LoraSb
from fedpeft.config.adapters.methods import ADAPTERS, REFUSED
from fedpeft.config.adapters.prompts import PromptTuning
from fedpeft.config.adapters.scales import HeadOnly, Ia3

__all__ = ["ADAPTERS", "REFUSED", "HeadOnly", "Ia3", "Lora", "LoraSb", "PromptTuning"]
