"""How worker processes begin: as forks of a process that has imported everything they need, and computed nothing.

A fork of the run's own process would share the locks of torch's threads, and a new process imports torch, transformers
and peft for seconds. This one has them once, and meanwhile the run's process imports them too. It ends with that.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Sequence
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext, SpawnContext
from pathlib import Path

from fedpeft.config import load
from fedpeft.errors import FedPeftError
from fedpeft.runs import RunFolder

PRELOADED = ["fedpeft.engines.nursery_imports"]
"""What is there for workers before they are forked."""

FORKS = sys.platform == "linux"
"""Whether forks are to be had: macOS's own libraries do not bear them."""


def context() -> ForkServerContext | SpawnContext:
    """What worker processes are made by."""
    if not FORKS:
        return multiprocessing.get_context("spawn")
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(PRELOADED)
    return found


def begin(path: Path | None, overrides: Sequence[str], resume: Path | None) -> None:
    """The process that workers are forks of begins to import, if these settings are of a run with several.

    What is wrong with the settings, whoever runs them says.
    """
    settings = RunFolder(resume).config if resume else path
    try:
        several = settings is not None and load(settings, list(overrides)).workers_on(os.cpu_count() or 1) > 1
    except (FedPeftError, OSError):
        return
    if several and FORKS:
        context()
        forkserver.ensure_running()
