"""The settings of a run: frozen dataclasses that own their fields, their checks and what they build."""

from fedpeft.config.fields import Choice, choose
from fedpeft.config.parse import digest, from_flat, from_tree, load, override, to_flat, to_toml, to_tree
from fedpeft.config.run import RunConfig

__all__ = [
    "Choice",
    "RunConfig",
    "choose",
    "digest",
    "from_flat",
    "from_tree",
    "load",
    "override",
    "to_flat",
    "to_toml",
    "to_tree",
]
