"""`fedpeft node`: a node that keeps the base in memory between messages."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

from fedpeft.config.node import load_node
from fedpeft.engines.flower_client import NODE_VARIABLE, client_app
from fedpeft.engines.flower_node import app_named, serve
from fedpeft.logs import FORMAT_VARIABLE, logging_to


def run(path: Path, app: str) -> None:
    """Serves the server that the node's file names, until the process is told to end.

    Raises:
        ConfigError: the file or the app cannot be used.
    """
    node = load_node(path)
    os.environ[NODE_VARIABLE] = str(path.absolute())
    logging.getLogger("httpx").setLevel(logging.WARNING)
    with logging_to(sys.stderr, os.environ.get(FORMAT_VARIABLE, "text")):
        serve(node, app_named(app) if app else client_app())
