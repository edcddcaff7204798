"""Run folders: where everything about one run is."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from fedpeft.config import RunConfig, load, override, to_flat, to_toml
from fedpeft.errors import ConfigError, RunFolderError, sentence
from fedpeft.files import write_atomically
from fedpeft.locks import LOCK


@dataclass(frozen=True)
class RunFolder:
    """The paths of one run."""

    root: Path

    @property
    def config(self) -> Path:
        """The settings as resolved."""
        return self.root / "config.toml"

    @property
    def journal(self) -> Path:
        """One JSON line for the start, each round, the bounds and the end."""
        return self.root / "journal.jsonl"

    @property
    def ledger(self) -> Path:
        """What a private run has spent, one JSON line an expense."""
        return self.root / "privacy.jsonl"

    @property
    def checkpoint(self) -> Path:
        """The server's last states."""
        return self.root / "checkpoint"

    @property
    def memories(self) -> Path:
        """What simulated clients keep between rounds."""
        return self.root / "memories"

    @property
    def cohort(self) -> Path:
        """Whether the clients of the in-process engine train together, as it was chosen."""
        return self.root / "cohort.json"

    @property
    def adapter(self) -> Path:
        """The adapter that a user deploys."""
        return self.root / "adapter"


def folder_for(config: RunConfig) -> RunFolder:
    """The folder that the settings name, which must not hold anything yet.

    Raises:
        RunFolderError: it exists and is not empty.
    """
    root = Path(config.out or Path("runs") / config.name).absolute()
    if root.exists() and (not root.is_dir() or any(not _unfinished(path) for path in root.iterdir())):
        raise RunFolderError(
            sentence(
                str(root),
                expected="no such folder yet, or an empty one",
                found="something there",
                remedy=f"choose another with --set out=DIR, continue it with --resume {root}, or remove it",
            )
        )
    return RunFolder(root)


def create(folder: RunFolder, config: RunConfig) -> None:
    """The folder exists and holds the settings as resolved.

    Raises:
        RunFolderError: it cannot be written.
    """
    try:
        write_atomically(folder.config, to_toml(config).encode())
    except OSError as error:
        raise RunFolderError(
            sentence(
                str(folder.root), expected="a folder that can be written", found=str(error), remedy="choose another"
            )
        ) from error


def reopen(root: Path, overrides: list[str]) -> tuple[RunFolder, RunConfig]:
    """The folder of an earlier run and its settings; overrides may change only what cannot change the result.

    Raises:
        RunFolderError: there is no run in `root`.
        ConfigError: an override would make it another run.
    """
    folder = RunFolder(root.absolute())
    if not folder.config.exists():
        raise RunFolderError(
            sentence(str(root), expected="a run folder with config.toml", found="none", remedy="check the path")
        )
    stored = load(folder.config)
    config = override(stored, [*overrides, f"out={folder.root}"])
    if result_of(config) != result_of(stored):
        raise ConfigError(
            sentence(
                "--set with --resume",
                expected="only compute.*, observation.*, model.device or evaluation.batch_size",
                found=", ".join(overrides),
                remedy="start a new run for other settings",
            )
        )
    return folder, config


def result_of(config: RunConfig) -> dict[str, object]:
    """The settings that decide what a run ends with, by their full names."""
    free = ("name", "out", "compute.", "observation.", "model.device", "evaluation.batch_size")
    return {key: value for key, value in to_flat(config).items() if not key.startswith(free)}


def _unfinished(path: Path) -> bool:
    """Whether the path is what a kill left of an atomic write, or of the folder's lock."""
    return path.name == LOCK or (path.name.startswith(".") and path.name.endswith(".part"))


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Inside, a disk that takes no more is a RunFolderError that names `path`.

    Raises:
        RunFolderError: the disk is full or not writable.
    """
    try:
        yield
    except OSError as error:
        remedy = "free disk space, then run again with --resume"
        raise RunFolderError(
            sentence(str(path), expected="room to write it", found=str(error), remedy=remedy)
        ) from error


def write_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """`folder` holds what `fill` wrote, or, if that failed, what it held before.

    Raises:
        RunFolderError: the disk is full or not writable.
    """
    scratch = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        scratch.mkdir(parents=True)
        fill(scratch)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(scratch, folder)
    except OSError as error:
        raise RunFolderError(
            sentence(str(folder), expected="room to write it", found=str(error), remedy="free disk space")
        ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
