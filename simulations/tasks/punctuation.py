"""Real sentences without their punctuation, and a tag for each word that says what stood behind it.

    python -m simulations.tasks.punctuation OUT.jsonl

Sentences come from the asset `sentiment`, so each kind of text (films, shops, a newspaper, microblogs) has habits of
its own. A word is tagged `B-COMMA`, `B-STOP`, `B-QUESTION` or `B-EXCLAMATION` after the mark that followed it, or `O`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from fedpeft import assets
from fedpeft.cli import script

MARKS: Mapping[str, str] = {",": "B-COMMA", ".": "B-STOP", "?": "B-QUESTION", "!": "B-EXCLAMATION"}
"""The tag of a word by the mark behind it."""

_WORD = re.compile(r"([^\W_][\w'’&-]*)([,.?!]?)")


def main(
    out: Annotated[Path, typer.Argument(help="The JSON Lines file to write.")],
    least_words: Annotated[int, typer.Option(min=1, help="Shorter sentences are left out.")] = 8,
    most_words: Annotated[int, typer.Option(min=1, help="Longer ones too: what is learned is never cut.")] = 32,
) -> None:
    """Write a row of words, tags and group for each sentence that has a mark in it."""
    lines = assets.rows_path("sentiment").read_text(encoding="utf-8").splitlines()
    rows = [{**tagged(row["text"]), "group": row["group"]} for row in map(json.loads, lines)]
    kept = [row for row in rows if least_words <= len(row["words"]) <= most_words and set(row["tags"]) - {"O"}]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept), encoding="utf-8")
    typer.echo(f"{len(kept)} sentences of {len({row['group'] for row in kept})} kinds: {out}")


def tagged(sentence: str) -> dict[str, list[str]]:
    """The words of a sentence in lower case, and their tags."""
    found = _WORD.findall(sentence)
    return {"words": [word.lower() for word, _ in found], "tags": [MARKS.get(mark, "O") for _, mark in found]}


if __name__ == "__main__":
    script(main)
