"""Methods of modules that others stand in for, for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn


@contextlib.contextmanager
def replaced(module: nn.Module, name: str, value: Callable[..., Any]) -> Iterator[None]:
    """Inside, `value` stands where the module's method of that name stood."""
    before = module.__dict__.get(name)
    module.__dict__[name] = value
    try:
        yield
    finally:
        del module.__dict__[name]
        if before is not None:
            module.__dict__[name] = before
