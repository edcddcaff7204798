"""What the process imports that workers are forks of; to import this is all that it does."""

from __future__ import annotations

import importlib
import signal

from fedpeft.imports import importing

signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches it too, but the run's own process decides
with importing():
    importlib.import_module("fedpeft.engines.worker")
