"""What server and nodes write into their logs: events, as text or as one JSON object a line.

Nothing of anybody's data stands in a log. What a node says in its own words reaches it only as one of the kinds of
`failure_kind`; the journal of the run, which stays on the server, holds the words. Every text is of one line, of
printable characters and of bounded length, so nothing can forge a line, colour a terminal or fill a disk.
"""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import math
import os
import re
import traceback
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any, TextIO

from fedpeft.errors import DataError, FederationError, FedPeftError, PacketError

FORMAT_VARIABLE = "FEDPEFT_LOG_FORMAT"
"""Names the form of a node's log, and of a server's until it has read its settings: text or json."""

MOST_CHARACTERS = 500
_MOST_WORD_CHARACTERS = 120
_MOST_ITEMS = 64
_FIELDS = "fedpeft_fields"
_FIRST = ("time", "level", "event", "run", "round", "node")
_SAID = re.compile(r"partition (\d{1,9}): ")
_PATH = re.compile(r"(?<![\w:/.])~?/[^\s/'\",;:]+/[^\s'\",;:]*")
_FOUND = re.compile(r", found .*?(?=; [^;]*$|$)")

_KINDS: tuple[tuple[str, re.Pattern[str]], ...] = tuple(
    (kind, re.compile(pattern, re.IGNORECASE))
    for kind, pattern in (
        ("no answer in time", r"within the deadline|timed? ?out|in time"),
        ("not connected", r"not connected|unavailable|connection"),
        ("not delivered", r"could not be handed"),
        ("out of memory", r"(?<!this node's )memory"),  # what a node remembers is another matter
        ("disk", r"no space left|disk|not writable|room to write"),
        ("stopped with an error", r"flower's error"),
        ("quarantined", r"quarantine"),
        ("not finite", r"\bfinite|\bnan\b|infinit"),
        ("norm too great", r"\ba norm of at most\b"),
        ("rank", r"\brank"),
        ("other version or settings", r"\bversion|\bconfig\b|\bspec\b|\bdigest"),
        ("malformed", r"payload|\bbytes\b|manifest|\bshape|a packet|\bmetric"),
        ("its data", r"\bdata\b|\brows?\b|\bcolumns?\b|\blabels?\b"),
        ("its model", r"\bmodel\b|\bbase\b"),
    )
)
FAILURE_KINDS = (*(kind for kind, _ in _KINDS), "another reason")


def failure_kind(reason: str) -> str:
    """One of FAILURE_KINDS: what a node's failure is about, in words that are ours."""
    bounded = reason[:MOST_CHARACTERS]
    return next((kind for kind, pattern in _KINDS if pattern.search(bounded)), FAILURE_KINDS[-1])


def one_line(text: str, most: int = MOST_CHARACTERS) -> str:
    """`text` in one line of printable characters, at most `most` of them: no line, colour or direction is forged."""
    cut = text[: most + 1]
    clean = "".join(letter if letter.isprintable() else " " for letter in cut)
    return clean if len(cut) <= most else f"{clean[: most - 1]}…"


def told(error: BaseException, *, shipped: bool = False) -> str:
    """What a log may say of an error: its sentence, with kinds in place of what nodes said.

    Of an error that is none of fedpeft's only the class is named: its text may hold anything. In a log that may be
    `shipped` to where logs are gathered, no path is told, and of mistakes in data, which quote it, the kind alone.
    """
    if not isinstance(error, FedPeftError):
        return type(error).__name__
    text = one_line(str(error), 4 * MOST_CHARACTERS)
    if isinstance(error, PacketError) or (shipped and isinstance(error, DataError)):
        return f"{type(error).__name__} ({failure_kind(text)})"
    words = _without_words(text) if isinstance(error, FederationError) else text
    return one_line(_PATH.sub("(a path)", words) if shipped else words)


def emit(
    logger: logging.Logger, event: str, text: str, *args: object, level: int = logging.INFO, **fields: Any
) -> None:
    """`event` is logged: as `text % args` where people read, with `fields` where a machine does."""
    logger.log(level, text, *args, extra={_FIELDS: {"event": event, **fields}})


def as_json(record: logging.LogRecord) -> str:
    """The record as one JSON object in one line of ASCII: time, level, event, what applies to it, and its text."""
    fields: dict[str, Any] = {
        "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
        "level": record.levelname.lower(),
        "event": "log",
        **getattr(record, _FIELDS, {}),
    }
    error = record.exc_info[1] if record.exc_info else None
    if error is not None:
        fields |= {"error": type(error).__name__, "at": _place(error)}
    line = {key: _plain(fields[key]) for key in sorted(fields, key=_rank)}
    return json.dumps({**line, "text": text_of(record, shipped=True)}, allow_nan=False)


def text_of(record: logging.LogRecord, *, shipped: bool = False) -> str:
    """The record's text, fit for a log; of an error that it carries, what a log may say."""
    given = record.args if isinstance(record.args, tuple) else (record.args,)
    try:
        text = str(record.msg) % tuple(_argument(value, shipped) for value in given) if record.args else str(record.msg)
    except (TypeError, ValueError, KeyError):
        text = str(record.msg)
    error = record.exc_info[1] if record.exc_info else None
    return one_line(text if error is None else f"{text}: {told(error, shipped=shipped)}", 2 * MOST_CHARACTERS)


class Line(logging.Formatter):
    """One line a record: JSON, or its text behind the words that say its level."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self._json = form == "json"

    def format(self, record: logging.LogRecord) -> str:
        """See logging.Formatter."""
        return as_json(record) if self._json else f"{record.levelname.lower()}: {text_of(record)}"


@contextlib.contextmanager
def logging_to(stream: TextIO, form: str, *, beside_display: bool = False) -> Iterator[None]:
    """Inside, what fedpeft logs goes to `stream`, and as JSON what libraries warn of too.

    As text `beside_display`, it is the warnings that no display tells.
    """
    spare = beside_display and form != "json"
    logger, warned = logging.getLogger("fedpeft"), logging.getLogger("py.warnings")
    before = (list(logger.handlers), logger.level, logger.propagate)
    handler = logging.StreamHandler(stream)
    handler.setFormatter(Line(form))
    if spare:
        handler.addFilter(lambda record: record.name != "fedpeft.events")
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(logging.WARNING if spare else logging.INFO)
    if form == "json":
        warned.addHandler(handler)
        logging.captureWarnings(True)
    try:
        yield
    finally:
        if form == "json":
            logging.captureWarnings(False)
            warned.removeHandler(handler)
        logger.handlers, logger.propagate = before[0], before[2]
        logger.setLevel(before[1])


def speak_through(flower: logging.Logger, form: str = "") -> None:
    """What fedpeft logs from here on stands in Flower's log, in the form that is asked for, else that of the variable.

    In JSON Flower's own lines become JSON too. In either form an error of fedpeft's stands there as its sentence alone.
    """
    ours = logging.getLogger("fedpeft")
    handlers = [getattr(handler, "inner", handler) for handler in flower.handlers]
    asked = form or os.environ.get(FORMAT_VARIABLE, "text")
    passing: list[logging.Handler] = [_Passing(handler, as_json_lines=asked == "json") for handler in handlers]
    ours.handlers, ours.propagate = passing, False
    ours.setLevel(logging.INFO)
    if asked == "json":
        flower.handlers = list(passing)
    if _as_sentence not in flower.filters:
        flower.addFilter(_as_sentence)


class _Passing(logging.Handler):
    """Hands a cleaned copy of each record to a handler of Flower's, or writes its JSON to where that one writes."""

    def __init__(self, inner: logging.Handler, *, as_json_lines: bool) -> None:
        super().__init__(inner.level)
        self.inner = inner
        self._json = as_json_lines and isinstance(inner, logging.StreamHandler)

    def emit(self, record: logging.LogRecord) -> None:
        """See logging.Handler."""
        if self._json and isinstance(self.inner, logging.StreamHandler):
            if not text_of(record):
                return
            try:
                self.inner.stream.write(f"{as_json(record)}\n")
                self.inner.flush()
            except (OSError, ValueError):
                self.handleError(record)
            return
        clean = copy.copy(record)
        clean.msg, clean.args, clean.exc_info, clean.exc_text = text_of(record), (), None, None
        self.inner.handle(clean)


def _as_sentence(record: logging.LogRecord) -> bool:
    error = record.exc_info[1] if record.exc_info else None
    if isinstance(error, FedPeftError):
        record.msg, record.args, record.exc_info = text_of(record), (), None
        setattr(record, _FIELDS, {"event": "error", "error": type(error).__name__})
    return True


def _without_words(text: str) -> str:
    """`text` up to where it lists what partitions said, and of each of them the kind alone."""
    head, bracket, tail = text.partition(" (partition ")
    if not bracket:
        return text
    _, *said = _SAID.split(f"partition {tail}")
    kinds = [f"partition {number}: {failure_kind(words)}" for number, words in zip(said[::2], said[1::2], strict=True)]
    return f"{head} ({'; '.join(kinds[:8])})"


def _argument(value: object, shipped: bool) -> object:
    """What may stand in a text: numbers as they are, an error as it may be told, a text without what was found."""
    if isinstance(value, BaseException):
        return told(value, shipped=shipped)
    if isinstance(value, bool | int | float):
        return value
    text = one_line(_FOUND.sub(", found something else", str(value)[: 4 * MOST_CHARACTERS]))
    return _PATH.sub("(a path)", text) if shipped else text


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {one_line(str(key), _MOST_WORD_CHARACTERS): _plain(value[key]) for key in list(value)[:_MOST_ITEMS]}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value[:_MOST_ITEMS]]
    return one_line(str(value), _MOST_WORD_CHARACTERS)


def _rank(key: str) -> tuple[int, str]:
    return (_FIRST.index(key), "") if key in _FIRST else (len(_FIRST), key)


def _place(error: BaseException) -> str:
    """The last function that an error went through, and its line."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"{os.path.basename(frames[-1].filename)}:{frames[-1].lineno} {frames[-1].name}" if frames else ""
