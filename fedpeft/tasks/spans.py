"""Entities in sequences of BIO tags."""

from __future__ import annotations

from collections.abc import Sequence

Span = tuple[int, int, str]
"""The first word of an entity, the one after its last, and its kind."""


def spans(tags: Sequence[str]) -> set[Span]:
    """The entities that BIO `tags` tell of.

    An `I-KIND` that follows no tag of its kind begins an entity, as the shared task's own script has it.

    Source: Tjong Kim Sang and De Meulder 2003, "Introduction to the CoNLL-2003 Shared Task", and its `conlleval`.
    """
    found: set[Span] = set()
    start, kind = 0, ""
    for at, tag in enumerate([*tags, "O"]):
        position, _, name = tag.partition("-")
        if kind and (position != "I" or name != kind):
            found.add((start, at, kind))
            kind = ""
        if name and not kind:
            start, kind = at, name
    return found
