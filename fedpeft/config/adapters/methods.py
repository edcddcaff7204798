"""The table of the adapter families' names, and of the methods that a federation cannot serve."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedpeft.adapters import EXACT, INEXACT, KINDS, PRODUCT, Family, together
from fedpeft.config.adapters.bottlenecks import Houlsby, ParallelAdapter, Pfeiffer, Ssf
from fedpeft.config.adapters.common import HYBRID, REPARAMETERISED
from fedpeft.config.adapters.low_rank import Lora, LoraSb
from fedpeft.config.adapters.masks import ChildTuning, FishMask
from fedpeft.config.adapters.products import AdaLora, HiRa, LoHa, LoKr
from fedpeft.config.adapters.prompts import LlamaAdapter, PrefixTuning, PromptTuning, PTuning, VisualPrompt
from fedpeft.config.adapters.rotations import Boft, Hra, Oft, Road
from fedpeft.config.adapters.scales import BitFit, HeadOnly, Ia3, LnTuning, TrainableTokens
from fedpeft.config.adapters.shared_bases import Frod, RandLora, Shira, TinyLora, Vera
from fedpeft.config.adapters.spectral import C3a, FourierFt, Miss, WaveFt
from fedpeft.config.fields import Table


@dataclass(frozen=True)
class Together:
    """Settings of several families on one base, such as `parallel+prefix_tuning` (MAM) or `lora+bitfit`."""

    members: tuple[Any, ...]

    def build(self) -> Family:
        """The families that these settings describe, as one.

        Raises:
            PlanError: peft would have to install two of them.
        """
        return together([member.build() for member in self.members])


REFUSED: Mapping[str, str] = {
    "xlora": "it mixes finished adapters by a gate, and what peft saves of that cannot be loaded again; use lora",
    "pissa": "it takes the adapter out of the base, which then differs from the one that others hold; use lora",
    "olora": "it takes the adapter out of the base, which then differs from the one that others hold; use lora",
    "corda": "it takes the adapter out of the base by a client's rows; use lora",
    "lora_ga": "it begins from the gradient on a client's rows, which only that client has; use lora",
    "eva": "it begins from the activations of a client's rows, which only that client has; use lora",
    "loftq": "it changes the base, and peft needs a GPU for it; use lora on a quantised base",
}
"""What is not offered, and why."""

ADAPTERS = Table(
    "family",
    {
        "lora": Lora,
        "lora_sb": LoraSb,
        "adalora": AdaLora,
        "loha": LoHa,
        "lokr": LoKr,
        "hira": HiRa,
        "vera": Vera,
        "randlora": RandLora,
        "tinylora": TinyLora,
        "frod": Frod,
        "miss": Miss,
        "fourierft": FourierFt,
        "waveft": WaveFt,
        "c3a": C3a,
        "shira": Shira,
        "oft": Oft,
        "boft": Boft,
        "hra": Hra,
        "road": Road,
        "ia3": Ia3,
        "ln_tuning": LnTuning,
        "trainable_tokens": TrainableTokens,
        "bitfit": BitFit,
        "fish_mask": FishMask,
        "child_tuning": ChildTuning,
        "prompt_tuning": PromptTuning,
        "prefix_tuning": PrefixTuning,
        "p_tuning": PTuning,
        "llama_adapter": LlamaAdapter,
        "visual_prompt": VisualPrompt,
        "houlsby": Houlsby,
        "pfeiffer": Pfeiffer,
        "parallel": ParallelAdapter,
        "ssf": Ssf,
        "head_only": HeadOnly,
    },
    together=Together,
    refused=REFUSED,
)
"""The adapter families by name."""


@dataclass(frozen=True)
class Method:
    """What users are told of a method.

    `group` is where surveys put it: additive, selective, reparameterised or hybrid. `tier` is "exact" where the mean
    of its numbers is the mean of what adapters do, "special rule" where a merge rule decides how near it comes,
    "inexact" where numbers are averaged that are not linear in their effect, "refused" where it is not offered.
    """

    name: str
    group: str
    tier: str
    reason: str


TIERS: Mapping[str, str] = {EXACT: "exact", PRODUCT: "special rule", INEXACT: "inexact"}
"""What users are told of a kind's mean."""

VARIANTS: Mapping[str, Mapping[str, str]] = {
    "lora": {"dora": "dora", "freeze_a": "lora_fa"},
    "vera": {"freeze_d": "vera_b"},
    "prefix_tuning": {"hidden": "encoded"},
}
"""Settings that make another kind of module, and which."""


def methods() -> tuple[Method, ...]:
    """Every method that is offered, variants and a combination of families among them, and those that are refused."""
    members: Mapping[str, Any] = ADAPTERS.members
    offered = [_offered(name, settings().build().kind, settings.group) for name, settings in members.items()]
    variants = [
        _offered(f"{name} with {setting}", kind, members[name].group)
        for name, settings in VARIANTS.items()
        for setting, kind in settings.items()
    ]
    mam = Method(
        "parallel+prefix_tuning", HYBRID, TIERS[INEXACT], "MAM: any families of our own layers join one of peft's by +"
    )
    refused = [Method(name, REPARAMETERISED, "refused", reason) for name, reason in REFUSED.items()]
    return (*offered, *variants, mam, *refused)


def _offered(name: str, kind: str, group: str) -> Method:
    return Method(name, group, TIERS[KINDS[kind].mean], KINDS[kind].why)
