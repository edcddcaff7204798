"""What settings of adapter families share."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, ClassVar

from fedpeft.config.fields import require

ADDITIVE, SELECTIVE, REPARAMETERISED, HYBRID = "additive", "selective", "reparameterised", "hybrid"
"""How surveys sort methods: by what they do to the base."""


@dataclass(frozen=True, kw_only=True)
class Everywhere:
    """Settings of a family that can be told which modules to adapt.

    `target_modules` are the last components of their paths, or `all-linear`; none takes peft's choice for the model.
    `options` are further settings of peft's own configuration, each `"name = value"` with a value as in JSON.
    """

    group: ClassVar[str] = REPARAMETERISED
    target_modules: tuple[str, ...] = ()
    options: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        read_options(self.options)

    @property
    def common(self) -> dict[str, Any]:
        """What peft's configuration is told of these settings."""
        return {"target_modules": named_modules(self.target_modules), **read_options(self.options)}


@dataclass(frozen=True, kw_only=True)
class InLayers(Everywhere):
    """Settings of a family that can be put into some of the layers only: those of the indices `layers` (none: all)."""

    layers: tuple[int, ...] = ()

    @property
    def common(self) -> dict[str, Any]:
        """What peft's configuration is told of these settings."""
        return {"layers_to_transform": list(self.layers) or None, **super().common}


def named_modules(names: tuple[str, ...]) -> Any:
    """Names of modules as peft's configurations take them."""
    return names[0] if names == ("all-linear",) else list(names) or None


def read_options(options: tuple[str, ...]) -> dict[str, Any]:
    """Options by name.

    Raises:
        ConfigError: one is not `name = value`.
    """
    found = {}
    for option in options:
        name, equals, value = option.partition("=")
        try:
            found[name.strip()] = json.loads(value)
            readable = bool(equals) and name.strip().isidentifier()
        except ValueError:
            readable = False
        require(
            readable,
            "options",
            expected='"name = value" with a value as in JSON',
            found=option,
            remedy='write it so, such as "use_rslora = true" or "init_weights = \\"gaussian\\""',
        )
    return found


def read_patterns(patterns: tuple[str, ...], key: str) -> dict[str, float]:
    """Numbers above 0 by pattern of module path.

    Raises:
        ConfigError: one is not `pattern = number`.
    """
    found = {}
    for item in patterns:
        pattern, _, number = item.rpartition("=")
        try:
            found[pattern.strip()] = float(number)
            readable = bool(pattern.strip()) and found[pattern.strip()] > 0
        except ValueError:
            readable = False
        require(readable, key, expected='"pattern = number" with a number above 0', found=item)
    return found
