"""No adapter: the base stays frozen and only the task's head learns (a linear probe)."""

from __future__ import annotations

from fedpeft.adapters.family import Family


def head_only() -> Family:
    """The family without tensors of its own."""
    return Family("head_only", "full", {}, {}, prefix="")
