"""What every adapter family tells the rest of the house."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fedpeft.errors import PlanError, sentence

OWN_PREFIX = "fedpeft_"
"""What the parameters of a layer that peft does not have begin with, after the path of the module they stand at."""

OWN_KINDS: Mapping[str, str] = {
    "bitfit": "selective",
    "layer_norm": "selective",
    "houlsby": "bottleneck",
    "pfeiffer": "bottleneck",
    "parallel": "bottleneck",
    "ssf": "ssf",
    "fish_mask": "mask",
    "child_tuning": "mask",
    "visual_prompt": "prompt",
}
"""The kind of module that each method makes which peft does not have."""

_CLASHES: Mapping[frozenset[str], str] = {
    frozenset({"bitfit", "ia3"}): "scales multiply trained biases, so that neither's mean is exact",
    frozenset({"bitfit", "road"}): "rotations turn trained biases, so that neither's mean is exact",
    frozenset({"bitfit", "ssf"}): "scales multiply trained biases, so that neither's mean is exact",
    frozenset({"bitfit", "ln_tuning"}): "both train the biases of the norms",
}
"""The families that cannot stand on one base together, and why."""

_ADD_TO_WEIGHTS = ("mask", "lora", "lora_fa", "lora_sb", "prompt", "encoded", "llama_adapter", "bottleneck")
"""The kinds that leave weights as they are, or add to them, so that what a mask adds keeps its meaning."""


@dataclass(frozen=True)
class Family:
    """A way to adapt a frozen base.

    `peft` are the arguments of the peft configuration that installs it (empty: peft installs nothing). `tensors` maps
    a component of peft's parameter names, or that and the last one with a dot between, to the tensor's name in
    an `AdapterState`. `folded` names the tensor that carries the module's scale, if any; `ranked` the one whose first
    axis is the rank. `prefix` is what peft puts before the base's own parameter names. `own` are layers that peft
    does not have, by method, with their settings; they stand under the peft adapter, if there is one. `rates` multiply
    the learning rate of tensors, by name. `chosen` says that a server has to choose which numbers are trained, by
    rows that it has, before anything begins.
    """

    name: str
    kind: str
    peft: Mapping[str, Any]
    tensors: Mapping[str, str]
    prefix: str = "base_model.model."
    folded: str = ""
    ranked: str = ""
    own: tuple[tuple[str, Mapping[str, Any]], ...] = ()
    rates: Mapping[str, float] = field(default_factory=dict)
    chosen: bool = False

    def locate(self, parameter: str, adapter: str = "default") -> tuple[str, str, str]:
        """(module path, kind, tensor) of one of peft's trainable parameter names, or of an own layer's.

        A parameter that no component of the family claims is trained whole: kind `full`.
        """
        parts = parameter.removeprefix(self.prefix).removeprefix("base_model.").split(".")
        if "modules_to_save" in parts:
            at = parts.index("modules_to_save")
            return ".".join(parts[:at]), "full", ".".join(part for part in parts[at + 1 :] if part != adapter)
        for at, part in enumerate(parts):
            if part.startswith(OWN_PREFIX):
                kind = OWN_KINDS[part.removeprefix(OWN_PREFIX)]
                return ".".join(parts[:at]) or part.removeprefix(OWN_PREFIX), kind, ".".join(parts[at + 1 :])
            tensor = self.tensors.get(part) or self.tensors.get(f"{part}.{parts[-1]}")
            if tensor:
                return ".".join(parts[:at]) or self.name, self.kind, tensor
        return ".".join(parts[:-1]), "full", parts[-1]


def together(families: Sequence[Family]) -> Family:
    """Several families on one base: layers of our own, and at most one that peft installs.

    Raises:
        PlanError: peft would have to install two of them, or one multiplies what another adds.
    """
    by_peft = [family for family in families if family.peft]
    if len(by_peft) > 1:
        names = " and ".join(family.name for family in by_peft)
        raise PlanError(
            sentence(
                "adapter.family",
                expected="at most one family that peft installs",
                found=names,
                remedy="keep one of them, and add bitfit, houlsby, pfeiffer or parallel",
            )
        )
    joined = {family.name for family in families}
    for pair, why in _CLASHES.items():
        if pair <= joined:
            one, other = sorted(pair)
            raise PlanError(
                sentence(
                    "adapter.family",
                    expected=f"{one} or {other}",
                    found=f"both, where {why}",
                    remedy="keep one of them",
                )
            )
    _require_additions(families)
    first = by_peft[0] if by_peft else families[0]
    own = tuple(layers for family in families for layers in family.own)
    chosen = any(family.chosen for family in families)
    return replace(first, name="+".join(family.name for family in families), own=own, chosen=chosen)


def _require_additions(families: Sequence[Family]) -> None:
    """Raises PlanError if one of `families` masks weights that another does more to than add."""
    masking = [family.name for family in families if family.kind == "mask"]
    other = [family.name for family in families if family.kind not in _ADD_TO_WEIGHTS]
    if masking and (other or len(masking) > 1):
        raise PlanError(
            sentence(
                "adapter.family",
                expected=f"{masking[0]} beside families that add to what weights give",
                found=(other or masking[1:])[0],
                remedy="keep one of them",
            )
        )


def peft_family(name: str, peft_type: str, tensors: Mapping[str, str], kind: str = "", **arguments: Any) -> Family:
    """A family that peft installs; its kind of module is called like it unless said otherwise."""
    return Family(name, kind or name, {"peft_type": peft_type, **arguments}, tensors)


def own_family(method: str, **settings: Any) -> Family:
    """A family of layers that peft does not have."""
    kind = OWN_KINDS[method]
    return Family(method, kind, {}, {}, prefix="", own=((method, settings),), chosen=kind == "mask")
