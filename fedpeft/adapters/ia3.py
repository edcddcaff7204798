"""IA3: learned scales on keys, values and feed-forward activations.

Source: Liu et al. 2022, "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context
Learning", section 3.3.
"""

from __future__ import annotations

from collections.abc import Sequence

from fedpeft.adapters.family import Family


def ia3(*, target_modules: Sequence[str], feedforward_modules: Sequence[str]) -> Family:
    """The IA3 family with these settings; empty sequences leave the choice to peft."""
    peft = {
        "peft_type": "IA3",
        "target_modules": list(target_modules) or None,
        "feedforward_modules": list(feedforward_modules) or None,
    }
    return Family("ia3", "ia3", peft, {"ia3_l": "l"})
