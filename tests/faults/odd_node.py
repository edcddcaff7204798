"""A node that misbehaves, one way a round: `python odd_node.py WAY,WAY,... FILE`; other rounds it is honest.

It is fedpeft's own node but for how it sends the answer of such a round.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flwr.app import Array, ArrayRecord, Message
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.inflatable.inflatable_object import (
    add_header_to_object_body,
    get_object_tree,
    no_object_id_recompute,
)

from fedpeft.commands import node
from fedpeft.engines import flower_node
from fedpeft.engines.flower_node import Uplink

Send = Callable[[Uplink, Message, float], None]
honest: Send = flower_node._send


class Bomb(Array):
    """An array that names its first chunk a hundred thousand times."""

    def deflate(self) -> bytes:
        named = {"dtype": "uint8", "shape": [10**12], "stype": self.stype, "arraychunk_ids": [0] * 10**5}
        return add_header_to_object_body(json.dumps(named).encode(), self)


Bomb.__qualname__ = "Array"


def with_array(reply: Message, array: Array) -> Message:
    """The answer with another payload."""
    (record,) = [value for value in reply.content.values() if isinstance(value, ArrayRecord)]
    record[next(iter(record))] = array
    return reply


def payload(reply: Message) -> Array:
    (record,) = [value for value in reply.content.values() if isinstance(value, ArrayRecord)]
    return next(iter(record.values()))


def twice(uplink: Uplink, reply: Message, seconds: float) -> None:
    """The same answer two times, and a third time under another name."""
    honest(uplink, reply, seconds)
    honest(uplink, reply, seconds)
    reply.metadata.__dict__["_created_at"] += 1e-3
    reply.metadata.__dict__["_message_id"] = ""
    honest(uplink, reply, seconds)


def bomb(uplink: Uplink, reply: Message, seconds: float) -> None:
    """An answer of half a megabyte that becomes twenty gigabytes where its chunks are joined."""
    array = payload(reply)
    honest(uplink, with_array(reply, Bomb(array.dtype, array.shape, array.stype, array.data)), seconds)


def huge(uplink: Uplink, reply: Message, seconds: float) -> None:
    """An answer a hundred times too long, all of it sent."""
    data = bytes(range(251)) * 250_000
    honest(uplink, with_array(reply, Array("uint8", (len(data),), payload(reply).stype, data)), seconds)


def many(uplink: Uplink, reply: Message, seconds: float) -> None:
    """An answer of which thousands of parts are declared besides, and none of those is ever sent."""

    def send(message: Message, tree: ObjectTree, runtime: float) -> Any:
        tree.children.extend(ObjectTree(object_id=f"{number:064x}") for number in range(3000))
        wanted, session = uplink.send(message, tree, runtime)
        return wanted, session

    honest(uplink._replace(send=send), reply, seconds)


def half(uplink: Uplink, reply: Message, seconds: float) -> None:
    """An answer whose head is sent, and nothing else."""
    reply.metadata.__dict__["_message_id"] = reply.object_id
    with no_object_id_recompute():
        uplink.send(reply, get_object_tree(reply), seconds)


WAYS: dict[str, Send] = {"honest": honest, "twice": twice, "bomb": bomb, "huge": huge, "many": many, "half": half}


def main(ways: str, file: str) -> None:
    planned = dict(enumerate((WAYS[way] for way in ways.split(",")), start=1))

    def send(uplink: Uplink, reply: Message, seconds: float) -> None:
        planned.get(int(reply.metadata.group_id or 0), honest)(uplink, reply, seconds)

    flower_node._send = send
    node.run(Path(file), "")


if __name__ == "__main__":
    main(*sys.argv[1:])
