"""Merges: how the updates of a round become the server's next adapter."""

from fedpeft.merges import exactness, passes, products
from fedpeft.merges.judged import SPACES, coordinatewise, judged
from fedpeft.merges.merge import WEIGHTS, Contribution, Merge, Merged
from fedpeft.merges.method import Method, Pruning
from fedpeft.merges.padded import MISSING
from fedpeft.merges.passes import Passes
from fedpeft.merges.projections import Project, as_is, corrected, restarted, truncated, with_residual
from fedpeft.merges.rule import by_product_norm, rule

__all__ = [
    "MISSING",
    "SPACES",
    "WEIGHTS",
    "Contribution",
    "Merge",
    "Merged",
    "Method",
    "Passes",
    "Project",
    "Pruning",
    "as_is",
    "by_product_norm",
    "coordinatewise",
    "corrected",
    "exactness",
    "judged",
    "passes",
    "products",
    "restarted",
    "rule",
    "truncated",
    "with_residual",
]
