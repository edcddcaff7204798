"""The folder of assets: a folder in it is complete or is not there."""

from __future__ import annotations

import lzma
import os
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

from fedpeft.assets.asset import Asset
from fedpeft.assets.download import download
from fedpeft.errors import AssetError, sentence

_BROKEN = (OSError, EOFError, zipfile.BadZipFile, tarfile.TarError, lzma.LZMAError, zlib.error, KeyError, ValueError)


def cache_folder() -> Path:
    """Where assets live: `$FEDPEFT_HOME`, else `fedpeft` under the user's cache folder."""
    home = os.environ.get("FEDPEFT_HOME")
    if home:
        return Path(os.path.expanduser(home))
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fedpeft"


def home_of(asset: Asset, cache: Path) -> Path:
    """The folder of `asset` in `cache`, whether it is there or not."""
    return cache / f"{asset.name}-{asset.digest[:12]}"


def install(asset: Asset, cache: Path, report: Callable[[str], None]) -> Path:
    """The folder of `asset` in `cache`; it is there only when it is complete.

    Raises:
        AssetError: the asset cannot be downloaded, is not what was published, or cannot be written; the cache is
            then as it was.
    """
    home = home_of(asset, cache)
    if home.is_dir():
        report(f"{asset.name}: already in {home}")
        return home
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix=f".{asset.name}.") as scratch:
            built = Path(scratch) / "built"
            built.mkdir()
            report(f"{asset.name}: downloading {_what(asset)} ({asset.megabytes} MB)")
            archives = [
                download(asset.name, package, Path(scratch) / f"package-{number}")
                for number, package in enumerate(asset.packages)
            ]
            report(f"{asset.name}: unpacking")
            for package, archive in zip(asset.packages, archives, strict=True):
                package.convert(archive, built)
            _publish(built, home)
    except _BROKEN as error:
        raise AssetError(
            sentence(
                f"asset {asset.name}",
                expected=f"a complete copy in {home}",
                found=f"{type(error).__name__}: {error}",
                remedy="make room there or set FEDPEFT_HOME to another folder, and fetch again",
            )
        ) from error
    report(f"{asset.name}: ready in {home}")
    return home


def _what(asset: Asset) -> str:
    return " and ".join(f"{package.name} {package.version}" for package in asset.packages)


def _publish(built: Path, home: Path) -> None:
    try:
        os.replace(built, home)
    except OSError:
        # Another process finished the same asset first.
        if not home.is_dir():
            raise
