"""Everything that fedpeft raises on purpose.

FedPeftError
├── ConfigError          a setting is unknown, out of range, or clashes with another
│   └── PlanError        two choices that cannot go together (the compatibility law)
├── AssetError           a packaged model or data set is absent or is not what it should be
├── DataError            rows, columns, labels or partitions that cannot be used
├── ModelError           a base model that cannot be loaded or adapted
├── AdapterError         an adapter that does not fit its specification
├── PacketError          what a peer sent is not what was asked for
├── CheckpointError      a checkpoint that cannot be written or read
├── RunFolderError       a run folder that exists already, or does not exist
└── FederationError      a round that could not be completed
    ├── QuorumError      fewer usable updates came back than the round needs
    └── RefusalError     a client that will not lend its update to what the server asks
"""

from __future__ import annotations

from collections.abc import Mapping


class FedPeftError(Exception):
    """A mistake or failure that a user can act on; its text is one complete sentence.

    `exit_code` is what the command line returns for it: 2 for a mistake in what was asked,
    1 for a run that was asked for rightly and failed.
    """

    exit_code = 2


class ConfigError(FedPeftError):
    """A setting is unknown, of the wrong type, or out of range."""


class PlanError(ConfigError):
    """Two settings, each valid alone, that cannot go together."""


class AssetError(FedPeftError):
    """A packaged model or data set is missing or does not match its checksum."""


class DataError(FedPeftError):
    """Rows, columns, labels or partitions cannot be used as asked."""


class ModelError(FedPeftError):
    """The base model cannot be loaded, or cannot carry the adapter asked for."""


class AdapterError(FedPeftError):
    """Adapter tensors do not fit the specification they claim to follow."""


class PacketError(FedPeftError):
    """A packet does not hold what its manifest or the plan says."""


class CheckpointError(FedPeftError):
    """A checkpoint could not be written whole, or is not what was written."""


class RunFolderError(FedPeftError):
    """A run folder is in the way, or is missing."""


class FederationError(FedPeftError):
    """A federation that was planned rightly failed while running."""

    exit_code = 1


class QuorumError(FederationError):
    """Fewer usable updates came back than the round needs; `missed` is what came of it, for the journal."""

    def __init__(self, text: str, missed: Mapping[str, object] | None = None) -> None:
        super().__init__(text)
        self.missed = dict(missed or {})


class RefusalError(FederationError):
    """What the server asks of a client could show more of its update than was agreed, so it goes no further."""


def sentence(place: str, *, expected: str, found: object, remedy: str) -> str:
    """One line that says where, what was expected, what was found, and what to do."""
    return f"{place}: expected {expected}, found {found}; {remedy}."
