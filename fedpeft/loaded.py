"""The bases with adapters on them that this process has loaded, and how many of them it keeps."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Protocol

from fedpeft.adapters import Family
from fedpeft.base_weights import held_bytes
from fedpeft.bases import digest_of, load_base
from fedpeft.config import RunConfig
from fedpeft.config.tasks import Head
from fedpeft.config.training import ModelConfig
from fedpeft.kept import kept
from fedpeft.models import AdaptedModel, load


class FamilySettings(Protocol):
    """Settings of an adapter family."""

    def build(self) -> Family:
        """The family that they describe."""
        ...

    def __hash__(self) -> int:
        """Equal settings are kept once."""
        ...


@kept(4)
def loaded(model: ModelConfig, family: FamilySettings, head: Head, seed: int) -> AdaptedModel:
    """The base with an adapter of `family` on it; loaded once for the same arguments."""
    return load(model, family.build(), head, seed)


def arguments_of(config: RunConfig) -> tuple[Hashable, ...]:
    """What decides which model with which adapter a run has: the arguments of `loaded`."""
    return (config.model, config.adapter.chosen, config.task.chosen.head, config.seed)


def keep_within(config: RunConfig, most_bytes: int) -> None:
    """The models that this process keeps beside that of `config` take at most `most_bytes`.

    Those that were not asked for the longest are let go first, as far as nobody else holds them.
    """
    own = arguments_of(config)
    others = {key: held_bytes(found.model) for key, found in loaded.kept() if key != own}
    total = sum(others.values())
    for key, size in others.items():
        if total > most_bytes:
            loaded.let_go(*key)
            total -= size


def keeps(adapted: AdaptedModel) -> bool:
    """Whether this process keeps the model for whoever asks for it again."""
    return any(found is adapted for _, found in loaded.kept())


def digest_of_base(config: RunConfig) -> str:
    """What tells the base from others, whether the adapter fits it or not; it is loaded for that.

    Raises:
        ModelError: it cannot be.
    """
    return digest_of(config.model, load_base(config.model, config.task.chosen.head, 0))
