"""Flower's reading of a message, made safe against what a peer declares in it.

Flower joins an array's chunks as often as the array names them, before anybody has seen its size: a megabyte that is
named a million times is a terabyte. And whatever it cannot read ends the process that asked for the message. Here an
object that is too large or malformed is read as an empty one, which `to_packet` then refuses in a sentence.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.supercore.inflatable.inflatable_object import (
    InflatableObject,
    get_object_body,
    get_object_children_ids_from_object_content,
)
from flwr.supercore.inflatable.inflatable_utils import inflatable_class_registry

from fedpeft.errors import PacketError, sentence

MOST_OBJECTS = 1024
"""A message of ours is a handful of objects and one more for each 5 MB; what has more is not ours."""

_EMPTY: dict[type[InflatableObject], Callable[[], InflatableObject]] = {
    Array: lambda: Array("", (), "", b""),
    ArrayRecord: lambda: ArrayRecord({}),
    ConfigRecord: lambda: ConfigRecord({}),
    MetricRecord: lambda: MetricRecord({}),
    RecordDict: lambda: RecordDict({}),
}

_logger = logging.getLogger(__name__)


def guard(most_bytes: int) -> None:
    """From now on this process reads no array of more than `most_bytes` from Flower, and nothing malformed ends it.

    A message's own head is not covered: Flower makes it, and an error in it still comes out of `pull_messages`.
    """
    for kind in _EMPTY:
        inflatable_class_registry[kind.__qualname__] = _guarded(kind, most_bytes)


def _guarded(kind: type[InflatableObject], most_bytes: int) -> type[InflatableObject]:
    """A class that is read like `kind`, or as an empty one."""

    def inflate(
        cls: type,  # noqa: ARG001
        object_content: bytes,
        children: dict[str, InflatableObject] | None = None,
    ) -> InflatableObject:
        try:
            if kind is Array:
                _require_size(object_content, children or {}, most_bytes)
            return kind.inflate(object_content, children)
        except Exception as error:  # whatever a peer has written must not end the process
            _logger.warning("a peer's %s cannot be read: %s: %s", kind.__qualname__, type(error).__name__, error)
            return _EMPTY[kind]()

    return type(kind.__qualname__, (kind,), {"inflate": classmethod(inflate)})


def _require_size(content: bytes, children: dict[str, Any], most_bytes: int) -> None:
    """Raises PacketError if the array's chunks, joined as often as it names them, are longer than `most_bytes`."""
    named = json.loads(get_object_body(content, Array))["arraychunk_ids"]
    sizes = [len(children[key].data) for key in get_object_children_ids_from_object_content(content)]
    size = sum(sizes[index] for index in named)
    if size > most_bytes:
        raise PacketError(
            sentence(
                "message, array",
                expected=f"at most {most_bytes} bytes",
                found=f"{size}",
                remedy="use the same adapter settings on both sides",
            )
        )
