"""What an asset is: packages at a version and checksum, and what becomes of them in the cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path


@dataclass(frozen=True)
class Package:
    """One downloadable file and what becomes of it.

    `kind` names how it is downloaded: a `wheel` or `sdist` by pip, a `deb` by apt-get. `convert(archive, folder)`
    writes into the asset's folder what the rest of fedpeft reads.
    """

    name: str
    version: str
    kind: str
    sha256: str
    convert: Callable[[Path, Path], None]


@dataclass(frozen=True)
class Asset:
    """A model or data set that comes as one or more packages, which are converted in this order into one folder.

    `megabytes` is what is downloaded. `rows` is the name of the JSON Lines file in the folder, empty for a model.
    """

    name: str
    packages: tuple[Package, ...]
    megabytes: int
    holds: str
    rows: str = ""

    @property
    def package(self) -> str:
        """The names of the packages, for a reader."""
        return ", ".join(package.name for package in self.packages)

    @property
    def digest(self) -> str:
        """What tells this asset's contents from another version's, in hexadecimal."""
        sums = [package.sha256 for package in self.packages]
        return sums[0] if len(sums) == 1 else sha256("".join(sums).encode()).hexdigest()
