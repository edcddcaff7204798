"""Hypothesis strategies over every setting, read off the settings classes."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

from fedpeft.codecs import ROUNDINGS
from fedpeft.config import Choice, RunConfig
from fedpeft.config.adapters import Lora
from fedpeft.config.adapters.rotations import Hra
from fedpeft.config.aggregation import FIRST
from fedpeft.config.codecs import HEAD_LEVELS
from fedpeft.config.federation import CHANNELS, RANKS, ByMemory, FailuresConfig, FederationConfig
from fedpeft.config.fields import Table
from fedpeft.config.observation import LOG_FORMATS, SINKS
from fedpeft.config.privacy import CentralPrivacy
from fedpeft.config.tasks import TokenClassification
from fedpeft.config.training import METRICS, ModelConfig
from fedpeft.merges import MISSING, SPACES, WEIGHTS
from fedpeft.optimizers import CONVENTIONS
from fedpeft.privacy import SOURCES
from fedpeft.privacy.examples import EXAMPLE_SAMPLERS

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
    "activation": st.sampled_from(["relu", "gelu", "silu"]),
    "alpha_pattern": st.sampled_from([(), ("query = 2.5",), ("layer.0.*=4", "value=8.0")]),
    "bits": st.integers(8, 32),
    "block_size": st.integers(2, 40),
    "cohort": st.sampled_from(["auto", "on", "off"]),
    "colluding": st.floats(0.0, 0.49),
    "dropout": st.floats(0.0, 0.49),
    "entropy": st.sampled_from(sorted(SOURCES)),
    "least_cohort": st.integers(2, 40),
    "convention": st.sampled_from(sorted(CONVENTIONS)),
    "delimiter": st.characters(exclude_categories=("Cs",)),
    "device": st.sampled_from(["auto", "cpu", "cuda", "cuda:1"]),
    "form": st.sampled_from(["prompt", "messages"]),
    "group_size": st.integers(2, 40),
    "keep": st.floats(0.01, 1.0),
    "first": st.sampled_from(FIRST),
    "level": st.integers(1, 19),
    "levels": st.sampled_from(HEAD_LEVELS),
    "label_smoothing": st.floats(0.0, 0.5),
    "labels": st.lists(TEXTS, min_size=2, max_size=4, unique=True).map(tuple),
    "links": st.sampled_from([(), ("ship = 4 1 600 50 80",)]),
    "log_format": st.sampled_from(LOG_FORMATS),
    "max_target_tokens": st.integers(2, 512),
    "max_tokens": st.integers(8, 512),
    "options": st.sampled_from([(), ("init_weights = true",), ('bias = "none"', "fan_in_fan_out=false")]),
    "rank_pattern": st.sampled_from([(), ("query = 2",), ("layer.0.*=4", "value=8")]),
    "tokens": st.lists(st.integers(0, 40), min_size=1, max_size=3, unique=True).map(tuple),
    "experiment": st.from_regex(r"[a-z ]{0,3}[a-z]", fullmatch=True),
    "project": st.from_regex(r"[a-z ]{0,3}[a-z]", fullmatch=True),
    "variant": st.sampled_from(["road_1", "road_2", "road_4"]),
    "metric": st.sampled_from(sorted(METRICS)),
    "compiled": st.just(""),
    "missing": st.sampled_from(MISSING),
    "name": st.from_regex(r"[a-z0-9_-]{1,8}", fullmatch=True),
    "precision": st.sampled_from(["float32", "bfloat16", "float16"]),
    "ranks": st.lists(st.integers(1, 40), min_size=1, max_size=3).map(tuple),
    "rounding": st.sampled_from(sorted(ROUNDINGS)),
    "sampler": st.sampled_from(EXAMPLE_SAMPLERS),
    "seed": st.integers(0, 2**63 - 1),
    "sinks": st.lists(st.sampled_from(sorted(SINKS)), max_size=3, unique=True).map(tuple),
    "source": st.text(min_size=1, max_size=6),
    "space": st.sampled_from(SPACES),
    "template": TEXTS.filter(lambda text: "{text}" not in text).map("{text}".__add__),
    "workers": st.just(1),  # more need as many threads
    "weights": st.sampled_from(sorted(WEIGHTS)),
    "device_map": st.sampled_from(["", "auto", "sequential"]),
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


@st.composite
def _choices(draw: st.DrawFn, table: Table) -> Choice:
    """Two members at most have settings other than their defaults, of which one or both may be in force."""
    names = draw(st.lists(st.sampled_from(sorted(table.members)), min_size=1, max_size=2, unique=True))
    members = {name: kind() for name, kind in table.members.items()}
    members |= {name: draw(settings_of(table.members[name])) for name in names}
    joined = "+".join(names) if table.together and draw(st.booleans()) else names[0]
    return Choice(table, joined, members)


@st.composite
def _federations(draw: st.DrawFn) -> FederationConfig:
    cohort = draw(st.integers(1, 20))
    return FederationConfig(
        clients=draw(st.integers(cohort, 40)),
        cohort=cohort,
        quorum=draw(st.integers(0, cohort)),
        deadline_seconds=draw(st.floats(0.1, 1e6)),
        most_update_norm=draw(st.floats(0, 1e6)),
        most_examples=draw(st.integers(0, 10**9)),
        failures=draw(settings_of(FailuresConfig)),
        ranks=draw(_choices(RANKS)),
        channel=draw(_choices(CHANNELS)),
    )


@st.composite
def _central(draw: st.DrawFn) -> CentralPrivacy:
    bands = draw(st.integers(1, 8))
    drawn = ["everyone", "fixed", "poisson", "reachable"]
    return CentralPrivacy(
        clip_norm=draw(st.floats(0.001, 10)),
        epsilon=draw(st.floats(0, 100)),
        delta=draw(st.floats(0, 1)),
        noise_multiplier=draw(st.floats(0, 100)),
        sampler="poisson" if bands > 1 else draw(st.sampled_from(drawn)),
        adaptive=bands == 1 and draw(st.booleans()),
        quantile=draw(st.floats(0.1, 0.9)),
        bands=bands,
        entropy=draw(st.sampled_from(sorted(SOURCES))),
    )


@st.composite
def _by_memory(draw: st.DrawFn) -> ByMemory:
    gigabytes = draw(st.lists(st.floats(0.001, 64), min_size=1, max_size=3).map(sorted))
    ranks = draw(st.lists(st.integers(1, 40), min_size=len(gigabytes), max_size=len(gigabytes)))
    return ByMemory(tuple(ranks), tuple(gigabytes))


def _token_classifications() -> st.SearchStrategy[TokenClassification]:
    labels = st.sampled_from([(), ("O", "B-x", "I-x"), ("B-per-son", "O")])
    return st.builds(TokenClassification, labels=labels, max_tokens=st.integers(8, 512))


def _loras() -> st.SearchStrategy[Lora]:
    hints = typing.get_type_hints(Lora)
    given = {item.name: _values(item, hints[item.name]) for item in dataclasses.fields(Lora)}
    options = st.sampled_from([(), ('init_lora_weights = "gaussian"',), ("lora_bias=false",)])
    return st.builds(Lora, **{**given, "freeze_a": st.just(False), "options": options})


def _models() -> st.SearchStrategy[ModelConfig]:
    hints = typing.get_type_hints(ModelConfig)
    given = {item.name: _values(item, hints[item.name]) for item in dataclasses.fields(ModelConfig)}
    return st.builds(ModelConfig, **{**given, "weights": st.sampled_from(["float32", "bfloat16", "nf4", "int8"])})


# Settings whose fields depend on one another, or mean another thing than elsewhere.
WHOLE: dict[type, Callable[[], st.SearchStrategy[Any]]] = {
    FederationConfig: _federations,
    ByMemory: _by_memory,
    CentralPrivacy: _central,
    TokenClassification: _token_classifications,
    Lora: _loras,
    ModelConfig: _models,
    Hra: lambda: st.builds(Hra, rank=st.integers(1, 20).map(lambda half: 2 * half), layers=PLAIN[tuple[int, ...]]),
}
