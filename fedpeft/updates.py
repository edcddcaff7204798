"""What travels from a client to a round, what a client keeps, and everything a round changes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fedpeft.adapters import AdapterSpec, AdapterState, Tensors


@dataclass(frozen=True)
class Update:
    """One client's contribution: trained minus received, always.

    `delta` holds the tensors of `spec`. `examples` and `tokens` are what it was trained on; `count` is how
    many clients it stands for. `metrics` are for people, never for the algebra.
    """

    spec: AdapterSpec
    delta: Tensors
    examples: int
    tokens: int
    count: int = 1
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Memory:
    """What one client keeps between rounds: tensors (personal factors, residuals) and plain JSON fields."""

    tensors: Tensors = field(default_factory=dict)
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ServerState:
    """Everything that a round changes; to resume is to load it.

    `run` names this run and no other, `round` counts the rounds that are done. `optimizer` holds the server
    optimiser's tensors, `progress` what early stopping remembers.
    """

    run: str
    round: int
    seed: int
    adapter: AdapterState
    optimizer: Tensors = field(default_factory=dict)
    progress: Mapping[str, float] = field(default_factory=dict)
