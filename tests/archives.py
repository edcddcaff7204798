"""Small archives made for a test: wheels, source distributions, Debian packages."""

from __future__ import annotations

import io
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path


def wheel(folder: Path, members: Mapping[str, str | bytes]) -> Path:
    """A wheel `toy-model` 1.0 that pip would download."""
    path = folder / "toy_model-1.0-py3-none-any.whl"
    about = "toy_model-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
        archive.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: toy-model\nVersion: 1.0\n")
        archive.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{about}/RECORD", "")
    return path


def tar(members: Mapping[str, bytes], links: Mapping[str, str] | None = None, form: str = "gz") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=f"w:{form}") as archive:  # type: ignore[call-overload]
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
        for name, target in (links or {}).items():
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = tarfile.SYMTYPE, target
            archive.addfile(entry)
    return buffer.getvalue()


def deb(folder: Path, members: Mapping[str, bytes], form: str = "xz") -> Path:
    """A Debian package `toy` 1.0: an ar archive whose last member is a packed tar of `members`."""
    path = folder / "toy_1.0_all.deb"
    parts = {"debian-binary": b"2.0\n", "control.tar.xz": b"odd", f"data.tar.{form}": tar(members, form=form)}
    data = b"!<arch>\n"
    for name, part in parts.items():
        data += (
            f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(part):<10}`\n".encode() + part + b"\n" * (len(part) % 2)
        )
    path.write_bytes(data)
    return path
