"""Preferences made of questions and answers: what was answered, over something worse.

    python -m simulations.tasks.preferences OUT.jsonl

The questions come from the asset `chatterbot`. Worse is the same answer with its words in disorder, or an answer to
another question of the topic (`--rejected other`). Nobody has judged these pairs, so they teach a model to keep its
words in order, or to keep to the question, and measure how well a federation does direct preference optimisation, not
what people like.
"""

from __future__ import annotations

import enum
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer

from fedpeft import assets
from fedpeft.cli import script
from fedpeft.data.rows import normalise
from fedpeft.randomness import rng

_LEAST_WORDS = 4


class Rejected(enum.StrEnum):
    """What the answer that was given is preferred to."""

    disorder = "disorder"
    other = "other"


Question = Mapping[str, str]
"""A row of the asset: `text`, `answer` and `group`, its topic."""


def main(
    out: Annotated[Path, typer.Argument(help="The JSON Lines file to write.")],
    seed: Annotated[int, typer.Option(help="What the rejected answers are drawn from.")] = 7,
    rejected: Annotated[Rejected, typer.Option(help="What is rejected.")] = Rejected.disorder,
    most_characters: Annotated[int, typer.Option(min=1, help="Longer answers are left out.")] = 200,
) -> None:
    """Write a row of text, chosen, rejected and group for each question."""
    lines = assets.rows_path("chatterbot").read_text(encoding="utf-8").splitlines()
    questions = [row for row in map(json.loads, lines) if len(row["answer"]) <= most_characters]
    made = list(pairs(questions, seed) if rejected is Rejected.other else in_disorder(questions, seed))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in made), encoding="utf-8")
    typer.echo(f"{len(made)} preferences on {len({row['group'] for row in made})} topics: {out}")


def pairs(questions: Sequence[Question], seed: int) -> Iterator[dict[str, str]]:
    """A preference for each question that is asked for the first time, in order.

    The rejected answer is drawn from those that its topic gives to other questions and never to this one; a question
    is left out where there is none.
    """
    of_topic: dict[str, dict[str, str]] = defaultdict(dict)
    own: dict[str, set[str]] = defaultdict(set)
    for row in questions:
        of_topic[row["group"]].setdefault(normalise(row["answer"]), row["answer"])
        own[normalise(row["text"])].add(normalise(row["answer"]))
    for row in _first(questions):
        asked = normalise(row["text"])
        others = [answer for key, answer in of_topic[row["group"]].items() if key not in own[asked]]
        if others:
            drawn = int(rng(seed, "rejected", asked).integers(len(others)))
            yield {"text": row["text"], "chosen": row["answer"], "rejected": others[drawn], "group": row["group"]}


def in_disorder(questions: Sequence[Question], seed: int) -> Iterator[dict[str, str]]:
    """A preference for each question that is asked for the first time and has an answer of four words or more."""
    for row in _first(questions):
        words = row["answer"].split()
        order = rng(seed, "disorder", normalise(row["text"])).permutation(len(words))
        mixed = " ".join(words[at] for at in order)
        if len(words) >= _LEAST_WORDS and mixed != " ".join(words):
            yield {"text": row["text"], "chosen": row["answer"], "rejected": mixed, "group": row["group"]}


def _first(questions: Iterable[Question]) -> Iterator[Question]:
    """The questions without those that were asked before."""
    seen: set[str] = set()
    for row in questions:
        if (asked := normalise(row["text"])) not in seen:
            seen.add(asked)
            yield row


if __name__ == "__main__":
    script(main)
