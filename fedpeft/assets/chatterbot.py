"""Questions and answers by topic, in English."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import yaml

from fedpeft.assets.rows import write_rows

CHATTERBOT_ROWS = "chatterbot.jsonl"
_TOPICS = "chatterbot_corpus/data/english/"


def questions_and_answers(archive: Path, folder: Path) -> None:
    """A wheel's English conversations become one `chatterbot.jsonl` of text, answer and group, the topic.

    Of each conversation the first two utterances are taken: what follows goes on with the talk in some topics, and
    answers the question once more in others. Repeats stay.

    Raises:
        KeyError: the wheel holds no English topics, or a topic no conversations.
        ValueError: a topic is not YAML.
    """
    with zipfile.ZipFile(archive) as wheel:
        topics = sorted(name for name in wheel.namelist() if name.startswith(_TOPICS) and name.endswith(".yml"))
        if not topics:
            raise KeyError(_TOPICS)
        for name in topics:
            pairs = _pairs(wheel.read(name).decode("utf-8"))
            topic = PurePosixPath(name).stem
            rows = ({"text": text, "answer": answer, "group": topic} for text, answer in pairs)
            write_rows(folder / CHATTERBOT_ROWS, rows)


def _pairs(content: str) -> Iterator[tuple[str, str]]:
    try:
        conversations = yaml.safe_load(content)["conversations"]
    except yaml.YAMLError as error:
        raise ValueError(f"not YAML: {error}") from error
    for talk in conversations:
        # One entry of the published file is a question and its answer in one piece of text.
        if isinstance(talk, list):
            yield talk[0].strip(), talk[1].strip()
