"""Federated parameter-efficient fine-tuning: nodes train an adapter, a server merges what they learned."""

from fedpeft.errors import FedPeftError
from fedpeft.merging import MergedAdapter, merge
from fedpeft.version import VERSION as __version__

__all__ = ["FedPeftError", "MergedAdapter", "__version__", "merge"]
