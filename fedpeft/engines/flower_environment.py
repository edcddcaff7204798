"""The environment that Flower's programs run in: nothing is sent home, looked up or installed while they run."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

HOME_VARIABLE = "FLWR_HOME"
"""Names the folder in which Flower keeps its connections and the apps that it has received."""

_QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
}


def flower_environment(home: Path, own: Mapping[str, str]) -> dict[str, str]:
    """The environment `own`, quiet, with Flower's folder at `home` and the programs beside this Python found first.

    Flower starts others of its programs by their bare names.
    """
    programs = str(Path(sys.executable).parent)
    path = f"{programs}{os.pathsep}{own.get('PATH', os.defpath)}"
    return {**own, **_QUIET, HOME_VARIABLE: str(home.absolute()), "PATH": path}
