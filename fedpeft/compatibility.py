"""Which merge rules go with which protections, worked out by asking the laws."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from fedpeft.adapters import AdapterSpec, ModuleSpec
from fedpeft.codecs import dense
from fedpeft.config import choose
from fedpeft.config.federation import CHANNELS
from fedpeft.config.merges import MERGES
from fedpeft.config.privacy import PRIVACY, in_sums
from fedpeft.errors import PlanError
from fedpeft.laws import check
from fedpeft.optimizers import sgd
from fedpeft.privacy import Population
from fedpeft.stages import identity
from fedpeft.strategy import Parts

_POPULATION = Population(100, 20)


def _spec(kind: str) -> AdapterSpec:
    """One module of this kind and a head, large enough for any rule."""
    factors = (("A", (2, 4)), ("B", (4, 2)))
    square = (("R", (2, 2)),) if kind == "lora_sb" else ()
    head = ModuleSpec("head", "full", 0, 1.0, (("weight", (2,)),))
    return AdapterSpec("base", kind, (head, ModuleSpec("layer", kind, 2, 1.0, (*factors, *square))))


def _protected(name: str, channel: str, **settings: Any) -> Callable[[Parts], Parts]:
    """How the mechanism of that name, with these settings, goes into a plan on such a channel."""

    def protect(parts: Parts) -> Parts:
        chosen = PRIVACY.members[name](**({"noise_multiplier": 1.0, **settings} if name != "none" else {}))
        privacy = choose(PRIVACY, name, **{name: chosen})
        mechanism, sums = in_sums(privacy, _POPULATION, CHANNELS.members[channel]().build())
        return replace(parts, mechanism=mechanism, channel=sums)

    return protect


PROTECTIONS: Mapping[str, Callable[[Parts], Parts]] = {
    "central noise": _protected("central", "plain"),
    "central, in bands": _protected("central", "plain", bands=4),
    "local noise": _protected("local", "plain"),
    "examples": _protected("example", "plain", rows=50),
    "secure sums": _protected("none", "secure"),
    "noise in secure sums": _protected("central", "secure", sampler="reachable"),
}
"""Every protection that a rule may go with, by what tables call it."""


def compatible(rule: str, protection: str) -> bool:
    """Whether the laws let a rule of that name, every client weighing the same, go with a protection."""
    method = MERGES.members[rule](weights="uniform").build()
    parts = PROTECTIONS[protection](Parts(identity(), dense(), method, sgd(1.0)))
    try:
        check(parts, _spec((*method.kinds, "lora")[0]), updates=20)
    except PlanError:
        return False
    return True


def table() -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    """The columns and rows of the compatibility of every rule with every protection."""
    rows = tuple((rule, *("yes" if compatible(rule, p) else "no" for p in PROTECTIONS)) for rule in MERGES.members)
    return ("rule", *PROTECTIONS), rows
