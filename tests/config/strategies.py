"""Hypothesis strategies over every setting, read off the settings classes."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

from fedpeft.config import Choice, RunConfig
from fedpeft.config.federation import RANKS, ByMemory, FederationConfig
from fedpeft.config.fields import Table
from fedpeft.config.training import METRICS
from fedpeft.merges import MISSING, SPACES, WEIGHTS
from fedpeft.optimizers import CONVENTIONS

TEXTS = st.text(max_size=6)
PLAIN: dict[Any, st.SearchStrategy[Any]] = {
    bool: st.booleans(),
    int: st.integers(1, 40),
    float: st.floats(0.001, 0.9),
    str: TEXTS,
    tuple[str, ...]: st.lists(TEXTS, max_size=3).map(tuple),
    tuple[int, ...]: st.lists(st.integers(0, 40), max_size=3).map(tuple),
}
# Settings whose values are bound more tightly than their type.
BOUND: dict[str, st.SearchStrategy[Any]] = {
    "convention": st.sampled_from(sorted(CONVENTIONS)),
    "delimiter": st.characters(exclude_categories=("Cs",)),
    "device": st.sampled_from(["auto", "cpu", "cuda", "cuda:1"]),
    "keep": st.floats(0.01, 1.0),
    "labels": st.lists(TEXTS, min_size=2, max_size=4, unique=True).map(tuple),
    "max_tokens": st.integers(8, 512),
    "metric": st.sampled_from(sorted(METRICS)),
    "missing": st.sampled_from(MISSING),
    "name": st.from_regex(r"[a-z0-9_-]{1,8}", fullmatch=True),
    "precision": st.sampled_from(["float32", "bfloat16", "float16"]),
    "ranks": st.lists(st.integers(1, 40), min_size=1, max_size=3).map(tuple),
    "seed": st.integers(0, 2**63 - 1),
    "source": st.text(min_size=1, max_size=6),
    "space": st.sampled_from(SPACES),
    "weights": st.sampled_from(sorted(WEIGHTS)),
}


def settings_of(kind: type) -> st.SearchStrategy[Any]:
    """Valid settings of the class `kind`."""
    if kind in WHOLE:
        return WHOLE[kind]()
    hints = typing.get_type_hints(kind)
    return st.builds(kind, **{item.name: _values(item, hints[item.name]) for item in dataclasses.fields(kind)})


def run_configs() -> st.SearchStrategy[RunConfig]:
    return settings_of(RunConfig)


def tables(kind: type = RunConfig, prefix: str = "") -> dict[str, Table]:
    """Every table that a setting of `kind` chooses from, under the setting's dotted key."""
    found: dict[str, Table] = {}
    hints = typing.get_type_hints(kind)
    for item in dataclasses.fields(kind):
        key = f"{prefix}{item.name}"
        if "table" in item.metadata:
            found[key] = item.metadata["table"]
        elif dataclasses.is_dataclass(hints[item.name]):
            found.update(tables(hints[item.name], f"{key}."))
    return found


def _values(item: dataclasses.Field[Any], hint: Any) -> st.SearchStrategy[Any]:
    if "table" in item.metadata:
        return _choices(item.metadata["table"])
    if dataclasses.is_dataclass(hint):
        return settings_of(typing.cast(type, hint))
    return BOUND.get(item.name, PLAIN[hint])


def _choices(table: Table) -> st.SearchStrategy[Choice]:
    members = st.fixed_dictionaries(
        {name: st.one_of(st.builds(kind), settings_of(kind)) for name, kind in table.members.items()}
    )
    return st.builds(Choice, st.just(table), st.sampled_from(sorted(table.members)), members)


@st.composite
def _federations(draw: st.DrawFn) -> FederationConfig:
    cohort = draw(st.integers(1, 20))
    return FederationConfig(
        clients=draw(st.integers(cohort, 40)),
        cohort=cohort,
        quorum=draw(st.integers(0, cohort)),
        deadline_seconds=draw(st.floats(0.1, 1e6)),
        most_update_norm=draw(st.floats(0, 1e6)),
        ranks=draw(_choices(RANKS)),
    )


@st.composite
def _by_memory(draw: st.DrawFn) -> ByMemory:
    gigabytes = draw(st.lists(st.floats(0.001, 64), min_size=1, max_size=3).map(sorted))
    ranks = draw(st.lists(st.integers(1, 40), min_size=len(gigabytes), max_size=len(gigabytes)))
    return ByMemory(tuple(ranks), tuple(gigabytes))


# Settings whose fields depend on one another.
WHOLE: dict[type, Callable[[], st.SearchStrategy[Any]]] = {FederationConfig: _federations, ByMemory: _by_memory}
