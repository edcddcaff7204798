"""Merges: how the updates of a round become one delta."""

from fedpeft.merges import exactness
from fedpeft.merges.mean import mean
from fedpeft.merges.merge import WEIGHTS, Merge, Merged

__all__ = ["WEIGHTS", "Merge", "Merged", "exactness", "mean"]
