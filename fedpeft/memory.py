"""What clients keep between rounds, on the disk of whoever holds it.

A client's memory after round r is one file; reading takes the newest one from *before* a given round. So a
round that is done again, after a crash or a message sent twice, starts from what its first try started from.
"""

from __future__ import annotations

import contextlib
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from fedpeft.errors import CheckpointError, sentence
from fedpeft.files import encode_tensors, read_tensors, write_atomically
from fedpeft.updates import Memory

KEPT_FILES = 3
"""Memories kept for each client: enough to go back two checkpoints."""


class MemoryStore(Protocol):
    """Where the memories of one or more clients are kept."""

    def load(self, run: str, partition: int, round_: int) -> Memory:
        """What the client of `partition` remembered when round `round_` began; empty at first."""
        ...

    def save(self, run: str, partition: int, round_: int, memory: Memory) -> None:
        """What the client of `partition` remembers after round `round_`."""
        ...


@dataclass(frozen=True)
class FolderMemory:
    """Memories as files `RUN/partition-P/round-R.safetensors` under `root`, readable by their owner alone.

    Of each partition the memories of the last `most_runs` are kept, of `most_bytes` in all (0: no bound); whenever one
    is saved the oldest are removed, never those of its own run.
    """

    root: Path
    most_runs: int = 0
    most_bytes: int = 0

    def load(self, run: str, partition: int, round_: int) -> Memory:
        """See MemoryStore.

        Raises:
            CheckpointError: the file is not what was written.
        """
        earlier = [path for number, path in self._files(run, partition) if number < round_]
        if not earlier:
            return Memory()
        try:
            tensors, fields = read_tensors(earlier[-1])
        except ValueError as error:
            raise CheckpointError(
                sentence(str(earlier[-1]), expected="a client's memory", found=str(error), remedy="delete the file")
            ) from error
        return Memory(tensors, fields)

    def save(self, run: str, partition: int, round_: int, memory: Memory) -> None:
        """See MemoryStore; memories too old to be needed again are removed.

        Raises:
            CheckpointError: the disk is full or not writable.
        """
        path = self._folder(run, partition) / f"round-{round_:06d}.safetensors"
        try:
            write_atomically(path, encode_tensors(memory.tensors, memory.fields), mode=0o600)
        except OSError as error:
            raise CheckpointError(
                sentence(str(path), expected="room to write it", found=str(error), remedy="free disk space")
            ) from error
        for _, old in self._files(run, partition)[:-KEPT_FILES]:
            old.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # what is too much now is so at the next round too
            self._forget(run, partition)

    def _forget(self, run: str, partition: int) -> None:
        """Of this partition's memories of other runs as many are left as there is room for beside those of `run`."""
        sizes = {folder: _bytes(folder) for folder in self.root.glob(f"*/partition-{partition}")}
        own = sizes.pop(self._folder(run, partition), 0)
        ages = {folder: max((file.stat().st_mtime_ns for file in folder.iterdir()), default=0) for folder in sizes}
        total, count = own + sum(sizes.values()), 1 + len(sizes)
        for folder in sorted(sizes, key=lambda folder: ages[folder]):
            if not (0 < self.most_runs < count or 0 < self.most_bytes < total):
                return
            shutil.rmtree(folder, ignore_errors=True)
            with contextlib.suppress(OSError):  # another partition has memories of that run too
                folder.parent.rmdir()
            total, count = total - sizes[folder], count - 1

    def _folder(self, run: str, partition: int) -> Path:
        if not re.fullmatch(r"[a-z0-9_-]{1,64}", run):
            raise CheckpointError(
                sentence("run name", expected="1 to 64 of a-z, 0-9, _ and -", found=repr(run), remedy="rename the run")
            )
        return self.root / run / f"partition-{partition}"

    def _files(self, run: str, partition: int) -> list[tuple[int, Path]]:
        paths = sorted(self._folder(run, partition).glob("round-*.safetensors"))
        return [(int(path.stem.removeprefix("round-")), path) for path in paths]


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())
