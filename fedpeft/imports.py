"""Importing torch, transformers and peft takes seconds, a quarter of them in search of garbage that is not there."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """No garbage is looked for meanwhile, nor ever among what is there by then: modules live as long as the process."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def leave_all() -> None:
    """At a process's end what it holds is not looked through: it is gone with it."""
    gc.freeze()
