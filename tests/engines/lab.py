"""A copy of the app, in which a test runs Flower's programs."""

from __future__ import annotations

import json
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from fedpeft.assets import ASSETS, cache_folder, home_of
from tests.engines import processes
from tests.engines.conftest import ROOT, SHRUNK

FINISHED_SECONDS = 240.0


@dataclass(frozen=True)
class Lab:
    """A copy of the app, and an environment in which Flower and fedpeft keep everything in one folder."""

    root: Path
    env: dict[str, str]

    @property
    def app(self) -> Path:
        return self.root / "app"

    def flwr(self, *arguments: object) -> str:
        return processes.run(processes.command("flwr", *arguments), self.env, self.app)

    def start(self, connection: str, out: Path, *overrides: str, more: tuple[str, ...] = ()) -> str:
        """The id of a new run of the shrunk demo."""
        asked = f'set="{" ".join((*SHRUNK, *overrides))}" out="{out}"'
        printed = self.flwr("run", ".", connection, "--format", "json", "-c", asked, *more)
        return str(json.loads(printed[printed.index("{") :])["run-id"])

    def status(self, connection: str, run_id: str) -> str:
        listed = json.loads(self.flwr("ls", connection, "--format", "json"))
        return next(run["status"] for run in listed["runs"] if str(run["run-id"]) == run_id)

    def finished(self, connection: str, run_id: str, *logs: Path) -> str:
        """The status of a run once it has finished."""

        def ended() -> str | None:
            status = self.status(connection, run_id)
            return status if status.startswith("finished") else None

        return processes.until(ended, FINISHED_SECONDS, "end of the run", *logs)


def lab_in(folder: Path) -> Lab:
    for name in ("fedpeft", "clients", "server", "simulations"):
        shutil.copytree(ROOT / name, folder / "app" / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder / "app")
    cache = folder / "cache"
    cache.mkdir()
    # Assets alone: what nodes keep stands beside them, and is not to be shared with whoever else uses that cache.
    for home in (home_of(asset, cache_folder()) for asset in ASSETS.values()):
        if home.is_dir():
            (cache / home.name).symlink_to(home)
    env = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    env |= {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}",
        "FLWR_HOME": str(folder / "flwr"),
        "FEDPEFT_HOME": str(cache),
        "COLUMNS": "200",
    }
    return Lab(folder, env)
