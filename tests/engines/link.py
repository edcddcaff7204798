"""Flower's SuperLink without its processes: both of its ends, called as its HTTP server calls them."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from flwr.app import Message
from flwr.app.message import remove_content_from_message
from flwr.common.constant import Status
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.fleet_pb2 import PullMessagesRequest, PushMessagesRequest
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, ObjectTree
from flwr.proto.node_pb2 import Node
from flwr.proto.task_pb2 import Task
from flwr.server.superlink.linkstate import LinkState, LinkStateFactory
from flwr.server.superlink.linkstate.in_memory_linkstate import RunRecord
from flwr.supercore.constant import FLWR_IN_MEMORY_DB_NAME, NOOP_FEDERATION_ID
from flwr.supercore.inflatable.inflatable_protobuf_utils import (
    make_pull_object_fn_protobuf,
    make_push_object_fn_protobuf,
)
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.run import Run
from flwr.superlink.federation import NoOpFederationManager
from flwr.superlink.grid import HttpGrid
from flwr.superlink.servicer.fleet import fleet_handlers
from flwr.superlink.servicer.runtime import runtime_handlers

from fedpeft.engines.flower_node import Uplink


@dataclass(frozen=True)
class ServerEnd:
    """What Flower's `HttpGrid` asks its server for."""

    state: LinkState
    task: Task

    def __getattr__(self, name: str) -> Callable[[Any], Any]:
        words = "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in name).lstrip("_")
        handler = getattr(runtime_handlers, words)
        return lambda request: handler(request, self.state, self.task)


@dataclass(frozen=True)
class Link:
    """A SuperLink with one run in it, and the grid of the run's server."""

    state: LinkState
    grid: HttpGrid
    pushed: list[str] = field(default_factory=list)

    def connect(self) -> Uplink:
        """A new node's connection."""
        number = int(self.state.create_node("owner", "owner", secrets.token_bytes(32), heartbeat_interval=1e6))
        self.state.acknowledge_node_heartbeat(number, 1e6)
        node = Node(node_id=number)

        def receive() -> tuple[Message, ObjectTree] | None:
            found = fleet_handlers.pull_messages(PullMessagesRequest(node=node), self.state, self.state.object_store)
            if not found.messages_list:
                return None
            return message_from_proto(found.messages_list[0]), found.message_object_trees[0]

        def send(message: Message, tree: ObjectTree, seconds: float) -> tuple[set[str], str]:
            head = remove_content_from_message(message) if message.has_content() else message
            asked = PushMessagesRequest(
                node=node,
                messages_list=[message_to_proto(head)],
                message_object_trees=[tree],
                clientapp_runtime_list=[seconds],
            )
            found = fleet_handlers.push_messages(asked, self.state)
            return set(found.objects_to_push), found.session_id

        def push(run: int, session: str, name: str, content: bytes) -> None:
            take = make_push_object_fn_protobuf(
                lambda asked: fleet_handlers.push_object(asked, self.state), node, run, session
            )
            take(name, content)
            self.pushed.append(name)

        def pull(run: int, name: str) -> bytes:
            return make_pull_object_fn_protobuf(lambda asked: fleet_handlers.pull_object(asked, self.state), node, run)(
                name
            )

        def confirm(run: int, name: str) -> None:
            asked = ConfirmMessageReceivedRequest(node=node, run_id=run, message_object_id=name)
            fleet_handlers.confirm_message_received(asked, self.state, self.state.object_store)

        return Uplink(number, receive, send, _unasked, _unasked, pull, push, confirm)


def _unasked(*_: Any) -> Any:
    raise AssertionError("a warm node asks for no app")


def link_of(run_id: int) -> Link:
    """A SuperLink in memory in which the run `run_id` is under way."""
    factory = LinkStateFactory(FLWR_IN_MEMORY_DB_NAME, NoOpFederationManager(), ObjectStoreFactory())
    run = Run.create_empty(run_id=run_id)
    run.federation_id, run.primary_task_id = NOOP_FEDERATION_ID, 1
    run.status.status = Status.RUNNING
    task = Task(task_id=1, run_id=run_id)
    state = factory.state()
    state.task_store[1] = task
    state.run_ids[run_id] = RunRecord(run=run)
    grid = HttpGrid(token="none")
    grid.set_run(run)
    grid._client = ServerEnd(state, task)
    return Link(state, grid)
