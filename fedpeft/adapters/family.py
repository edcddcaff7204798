"""What every adapter family tells the rest of the house."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Family:
    """A way to adapt a frozen base.

    `peft` are the arguments of the peft configuration that installs it (empty: nothing is installed, only
    the head learns). `tensors` maps a component of peft's parameter names, or that and the last one with a dot
    between, to the tensor's name in an `AdapterState`. `folded` names the tensor that carries the module's scale,
    if any; `ranked` the one whose first axis is the rank. `prefix` is what peft puts before the base's own
    parameter names.
    """

    name: str
    kind: str
    peft: Mapping[str, Any]
    tensors: Mapping[str, str]
    prefix: str = "base_model.model."
    folded: str = ""
    ranked: str = ""

    def locate(self, parameter: str, adapter: str = "default") -> tuple[str, str, str]:
        """(module path, kind, tensor) of one of peft's trainable parameter names.

        A parameter that no component of the family claims is trained whole: kind `full`.
        """
        parts = parameter.removeprefix(self.prefix).removeprefix("base_model.").split(".")
        if "modules_to_save" in parts:
            at = parts.index("modules_to_save")
            return ".".join(parts[:at]), "full", ".".join(part for part in parts[at + 1 :] if part != adapter)
        for at, part in enumerate(parts):
            tensor = self.tensors.get(part) or self.tensors.get(f"{part}.{parts[-1]}")
            if tensor:
                return ".".join(parts[:at]) or self.name, self.kind, tensor
        return ".".join(parts[:-1]), "full", parts[-1]
