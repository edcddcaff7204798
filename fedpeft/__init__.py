"""Federated parameter-efficient fine-tuning: nodes train an adapter, a server merges what they learned."""

import logging

import fedpeft.blas  # noqa: F401 - before NumPy
from fedpeft.errors import FedPeftError
from fedpeft.merging import MergedAdapter, merge
from fedpeft.version import VERSION as __version__

# It warns of a faster kernel that it would have to download, on every import of peft.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

__all__ = ["FedPeftError", "MergedAdapter", "__version__", "merge"]
