"""A method's settings, checked."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fedpeft.errors import ModelError, sentence
from fedpeft.own_layers.layers import ACTIVATIONS
from fedpeft.own_layers.methods import OWN, Method

_MOST = 65536
"""No bottleneck is wider, no base deeper."""


@dataclass(frozen=True)
class Settings:
    """What a method is installed with.

    A bottleneck has `bottleneck` hidden units, or where that is 0 the width divided by `reduction`. `layers` are
    indices and `target_modules` the last components of paths; empty means all, and the method's own choice. `biases`
    are patterns, as in `fnmatch`, of the full names of the biases to train; empty means all. A prompt has `tokens`
    vectors. A mask trains a `share` of the base's numbers, of each parameter
    alike where it is `balanced`.
    """

    bottleneck: int = 0
    reduction: int = 1
    scale: float = 1.0
    activation: str = "relu"
    layers: tuple[int, ...] = ()
    target_modules: tuple[str, ...] = ()
    biases: tuple[str, ...] = ()
    tokens: int = 10
    share: float = 1.0
    balanced: bool = False

    def size(self, width: int) -> int:
        """How many hidden units a bottleneck has beside a module of `width`."""
        return self.bottleneck or max(1, width // self.reduction)


def method_of(name: Any) -> Method:
    """The method called `name`.

    Raises:
        ModelError: there is none.
    """
    method = OWN.get(name) if isinstance(name, str) else None
    if method is None:
        raise ModelError(
            sentence("adapter", expected=f"one of {', '.join(OWN)}", found=repr(name), remedy="name one of those")
        )
    return method


def settings_of(method: Method, given: Mapping[str, Any]) -> Settings:
    """`given` over the method's own defaults.

    Raises:
        ModelError: a setting is not one of the method's, or is out of range.
    """
    for key, value in given.items():
        expected, holds = _RULES.get(key, ("", _never))
        if key not in method.settings:
            raise ModelError(
                sentence(
                    f"adapter.{method.name}",
                    expected=f"settings among {', '.join(method.settings)}",
                    found=repr(key),
                    remedy="leave it out",
                )
            )
        if not holds(value):
            raise ModelError(
                sentence(f"adapter.{method.name}.{key}", expected=expected, found=repr(value), remedy="correct it")
            )
    return Settings(**{key: _frozen(value) for key, value in {**method.settings, **given}.items()})


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list | tuple) else value


def _never(_: Any) -> bool:
    return False


def _whole(least: int) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, int) and not isinstance(value, bool) and least <= value <= _MOST


def _positive(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value) and value > 0


def _each(holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list | tuple) and all(holds(item) for item in value)


def _text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


_RULES: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    "bottleneck": (f"a whole number, 0 to {_MOST}", _whole(0)),
    "reduction": (f"a whole number, 1 to {_MOST}", _whole(1)),
    "balanced": ("true or false", lambda value: isinstance(value, bool)),
    "share": ("a number above 0, at most 1", lambda value: _positive(value) and value <= 1),
    "tokens": ("a whole number, 1 or more", _whole(1)),
    "scale": ("a number above 0", _positive),
    "activation": (f"one of {', '.join(ACTIVATIONS)}", lambda value: isinstance(value, str) and value in ACTIVATIONS),
    "layers": ("a list of layers' indices", _each(_whole(0))),
    "target_modules": ("a list of modules' names", _each(_text)),
    "biases": ("a list of patterns", _each(_text)),
}
