"""A folder that one process has to itself, until it lets go or dies."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import logging
import os
from collections.abc import Iterator
from pathlib import Path

from fedpeft.errors import RunFolderError, sentence

LOCK = ".lock"
"""The file in the folder that is locked; it holds the number of the process that has it."""

_WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)

_logger = logging.getLogger(__name__)
_held: set[int] = set()


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Inside, no other process is inside with this `folder`, which is made if there is none.

    The lock is the system's own (`flock`): it goes with the process, however that ends. A process that is split off
    inside does not keep it. On a disk that knows no locks, as some that are shared over a network, a warning takes its
    place.

    Raises:
        RunFolderError: another process is inside; the sentence has its number. Or the folder cannot be written.
    """
    path = folder / LOCK
    _let_go_in_children()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = _locked(path)
    except OSError as error:
        raise RunFolderError(
            sentence(str(folder), expected="a folder that can be written", found=str(error), remedy="choose another")
        ) from error
    _held.add(handle)
    try:
        yield
    finally:
        if handle in _held:
            _held.remove(handle)
            path.unlink(missing_ok=True)
            os.close(handle)


def taken(folder: Path) -> bool:
    """Whether a process is inside with this `folder` now; on a disk that knows no locks nobody ever seems to be."""
    try:
        handle = os.open(folder / LOCK, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(handle)
    return False


def _locked(path: Path) -> int:
    """A handle of the file at `path`, locked, with this process's number in it.

    Whoever ends removes the file, so a lock on a file that is no longer at `path` is worth nothing.
    """
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            _lock(handle, path)
            if _is_at(handle, path):
                os.ftruncate(handle, 0)
                os.pwrite(handle, str(os.getpid()).encode(), 0)
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def _lock(handle: int, path: Path) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(handle, 20, 0).decode(errors="replace").strip()
        who = f"process {holder}" if holder.isdigit() else "another process"
        raise RunFolderError(
            sentence(
                str(path.parent),
                expected="a run folder that no other process writes",
                found=f"{who} at work in it",
                remedy="wait for that one or end it, or choose another folder",
            )
        ) from None
    except OSError as error:
        if error.errno not in _WITHOUT_LOCKS:
            raise
        _logger.warning("%s is on a disk that knows no locks: see that no other process writes there", path.parent)


def _is_at(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False


@functools.cache
def _let_go_in_children() -> None:
    """From now on a process that is split off closes what it has got of this process's locks."""

    def close() -> None:
        while _held:
            os.close(_held.pop())

    os.register_at_fork(after_in_child=close)
