"""Members of archives, opened by name; nothing else of an archive is ever written."""

from __future__ import annotations

import contextlib
import io
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO


def member(archive: tarfile.TarFile, name: str) -> IO[bytes]:
    """The file `name` of an open archive.

    Raises:
        KeyError: the archive has no such file.
    """
    source = archive.extractfile(name)
    if source is None:
        raise KeyError(f"{name} is not a file")
    return source


def write(source: IO[bytes], path: Path) -> None:
    """`path` holds what `source` still holds."""
    with path.open("wb") as target:
        shutil.copyfileobj(source, target, 1 << 20)


def keep_notice(files: tarfile.TarFile, package: str, folder: Path) -> None:
    """`folder` holds a Debian package's copyright notice, which its licence asks to stay with every copy.

    Raises:
        KeyError: the package lacks it.
    """
    with member(files, f"./usr/share/doc/{package}/copyright") as source:
        write(source, folder / f"{package}.copyright")


@contextlib.contextmanager
def debian_files(path: Path) -> Iterator[tarfile.TarFile]:
    """The files that a Debian package would install, as an open archive with names such as `./usr/share/...`.

    Raises:
        ValueError: the file is not a Debian package.
    """
    # A package is an ar archive: eight bytes, then members of a 60-byte header (name, date, owner, group, mode,
    # size, end mark) and their bytes, padded to an even length.
    data = path.read_bytes()
    if not data.startswith(b"!<arch>\n"):
        raise ValueError(f"{path.name} is not a Debian package")
    at = 8
    while at + 60 <= len(data):
        name, size = data[at : at + 16].decode("ascii").rstrip(" /"), int(data[at + 48 : at + 58])
        if name.startswith("data.tar"):
            with tarfile.open(fileobj=io.BytesIO(data[at + 60 : at + 60 + size])) as files:
                yield files
            return
        at += 60 + size + size % 2
    raise ValueError(f"{path.name} holds no files")
