"""Every kind of sink by its name; a library is imported where its sink is opened, and nowhere else."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Mapping
from typing import Any

from fedpeft.sinks.sink import About, Kind, Sink


def _kind(name: str, library: str, extra: str, **environment: str) -> Kind:
    def open_sink(settings: Any, about: About) -> Sink:
        for variable, value in environment.items():
            os.environ.setdefault(variable, value)
        opener = getattr(importlib.import_module(f"fedpeft.sinks.{name}"), f"open_{name}")
        sink: Sink = opener(settings, about)
        return sink

    return Kind(library, extra, open_sink)


# A tracker that works offline reports nothing of itself either; what its operator has set stands.
KINDS: Mapping[str, Kind] = {
    "prometheus": _kind("prometheus", "prometheus_client", "monitoring"),
    "tensorboard": _kind("tensorboard", "tensorboard", "monitoring"),
    "mlflow": _kind("mlflow", "mlflow", "trackers", MLFLOW_DISABLE_TELEMETRY="true", MLFLOW_ALLOW_FILE_STORE="true"),
    "wandb": _kind("wandb", "wandb", "trackers", WANDB_ERROR_REPORTING="false"),
}
"""The sinks that `observation.sinks` may name."""


def remedy_of(kind: Kind) -> str:
    """What installs the library that a sink of `kind` needs; empty where it is installed."""
    return "" if importlib.util.find_spec(kind.library) else f"pip install 'fedpeft[{kind.extra}]'"
