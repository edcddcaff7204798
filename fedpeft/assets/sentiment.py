"""Sentences rated by people, from four kinds of source."""

from __future__ import annotations

import html
import tarfile
from collections.abc import Iterator
from pathlib import Path

from fedpeft.assets.archives import member
from fedpeft.assets.rows import write_rows

ROWS_FILE = "sentiment.jsonl"
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
    packed_name = f"{archive.name.removesuffix('.tar.gz')}/additional_resources/hutto_ICWSM_2014.tar.gz"
    with (
        tarfile.open(archive) as outer,
        member(outer, packed_name) as packed,
        tarfile.open(fileobj=packed) as inner,
    ):
        write_rows(folder / ROWS_FILE, _rows(inner))


def _rows(archive: tarfile.TarFile) -> Iterator[dict[str, str]]:
    for group, stem in _SNIPPETS.items():
        with member(archive, f"hutto_ICWSM_2014/{stem}_GroundTruth.txt") as source:
            for text, label in _rated(source.read().decode("utf-8")):
                yield {"text": text, "label": label, "group": group}


def _rated(content: str) -> Iterator[tuple[str, str]]:
    for line in content.removesuffix("\r\n").split("\r\n"):
        _, rating, text = line.split("\t")
        yield html.unescape(html.unescape(text)).strip(), _polarity(float(rating))


def _polarity(rating: float) -> str:
    if rating < -0.5:
        return "negative"
    return "positive" if rating > 0.5 else "neutral"
