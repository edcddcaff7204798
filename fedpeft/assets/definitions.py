"""Words and what three dictionaries say of them: WordNet, the Jargon File, and The Devil's Dictionary.

A row's text is `Define:` and the word, its answer is the entry's first paragraph, and its group is the dictionary:
three ways of writing under one instruction.
"""

from __future__ import annotations

import gzip
import re
import string
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from fedpeft.assets.archives import debian_files, keep_notice, member
from fedpeft.assets.rows import write_rows

DEFINITIONS_ROWS = "definitions.jsonl"

# As many nouns of WordNet's 82,115 as keep it near the size of the other two.
_EVERY = 20
# A dictd index counts in base 64 with these digits.
_DIGITS = {
    sign: value for value, sign in enumerate(f"{string.ascii_uppercase}{string.ascii_lowercase}{string.digits}+/")
}


def wordnet(archive: Path, folder: Path) -> None:
    """Every twentieth noun of a Debian package's WordNet, without the examples.

    Source: wndb(5WN): fields separated by spaces, the first word the fifth, the gloss after `|`.

    Raises:
        KeyError: the package lacks the nouns.
        ValueError: it is not a Debian package, or a line is not as described.
    """
    with debian_files(archive) as files:
        keep_notice(files, "wordnet-base", folder)
        content = _read(files, "./usr/share/wordnet/data.noun").decode("utf-8")
    lines = [line for line in content.splitlines() if not line.startswith("  ")]
    _write(folder, "wordnet", (_noun(line) for line in lines[::_EVERY]))


def jargon_file(archive: Path, folder: Path) -> None:
    """The Jargon File out of a Debian package, without pronunciations and cross-reference marks.

    Raises:
        KeyError: the package lacks the dictionary.
        ValueError: it is not a Debian package, or its index does not fit.
    """
    with debian_files(archive) as files:
        keep_notice(files, "dict-jargon", folder)
        _write(folder, "jargon", _told(_jargon(text) for text in _entries(files, "jargon")))


def devils_dictionary(archive: Path, folder: Path) -> None:
    """The Devil's Dictionary out of a Debian package, without parts of speech.

    Raises:
        KeyError: the package lacks the dictionary.
        ValueError: it is not a Debian package, or its index does not fit.
    """
    with debian_files(archive) as files:
        keep_notice(files, "dict-devil", folder)
        _write(folder, "devil", _told(_devil(text) for text in _entries(files, "devil")))


def _write(folder: Path, group: str, pairs: Iterable[tuple[str, str]]) -> None:
    rows = ({"text": f"Define: {word}", "answer": answer, "group": group} for word, answer in pairs)
    write_rows(folder / DEFINITIONS_ROWS, rows)


def _told(pairs: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    return ((word, answer) for word, answer in pairs if answer)


def _noun(line: str) -> tuple[str, str]:
    facts, gloss = line.split(" | ", 1)
    return facts.split(" ")[4].replace("_", " "), re.split(r'; "', gloss, maxsplit=1)[0].strip()


def _jargon(entry: str) -> tuple[str, str]:
    heading, *paragraphs = re.split(r"\n\s*\n", entry)
    # What stands in brackets first says where the word comes from; a 1 counts the meanings.
    said = [re.sub(r"^(1\. )?(\[[^]]*\] ?)?", "", _flat(re.sub(r"[{}]", "", text))) for text in paragraphs]
    return heading.splitlines()[0].strip(), next((text for text in said if text), "")


def _devil(entry: str) -> tuple[str, str]:
    found = re.match(r"([^.]+?),\s+[a-z .&]+\.\s+(\S.*)", _flat(re.split(r"\n\s*\n", entry)[0]))
    return (found.group(1).lower(), found.group(2)) if found else ("", "")


def _flat(text: str) -> str:
    return " ".join(text.split())


def _entries(files: tarfile.TarFile, name: str) -> Iterator[str]:
    """The entries of a dictd dictionary in its order, each once; those that describe the dictionary are left out."""
    folder = "./usr/share/dictd"
    index, text = _read(files, f"{folder}/{name}.index"), gzip.decompress(_read(files, f"{folder}/{name}.dict.dz"))
    places = {
        (_number(start), _number(size))
        for word, start, size in (line.split("\t") for line in index.decode("utf-8").splitlines())
        if not word.startswith(("00database", "00-database"))
    }
    for start, size in sorted(places):
        if start + size > len(text):
            raise ValueError(f"the index of {name} points behind its end")
        yield text[start : start + size].decode("utf-8")


def _read(files: tarfile.TarFile, name: str) -> bytes:
    with member(files, name) as source:
        return source.read()


def _number(digits: str) -> int:
    value = 0
    for sign in digits:
        value = value * 64 + _DIGITS[sign]
    return value
