"""A node that stays warm: one process that speaks Flower's fleet protocol and runs this installation's client.

Flower's own SuperNode starts a process for every message, which loads torch, transformers and the base again, and it
runs whatever code the server has bundled with the run. This node keeps the model between messages and runs only what
is installed here: of what the server sends it reads messages, and nothing else. To the server it is a SuperNode.

It leans on Flower's connection of a SuperNode, which is no public interface; versions are pinned, and a test holds it.
"""

from __future__ import annotations

import functools
import importlib
import logging
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.supercore.inflatable.inflatable_object import (
    InflatableObject,
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectPushError,
    pull_and_inflate_object_from_tree,
    push_object_contents_from_iterable,
)
from flwr.supercore.run import RunNotRunningException
from flwr.supercore.task_identity import TaskIdentity

from fedpeft.config.node import NodeConfig
from fedpeft.engines.flower_guard import MOST_OBJECTS, guard
from fedpeft.engines.flower_patience import patient_connection
from fedpeft.errors import ConfigError, sentence
from fedpeft.node_key import private_key
from fedpeft.pulse import Pulse, shown
from fedpeft.wire import PHASE

POLL_SECONDS, MOST_POLL_SECONDS = 0.2, 3.0
"""How long the node waits at least and at most before it asks again whether there is a message."""

_MOST_BYTES = 8 * 10**9
"""The greatest array that is read where the node's file has no bound on memory."""

UNSENT = -1.0
"""In place of the seconds that the last answer took to send, where there was none."""

_ERROR_SECONDS = 2.0
"""How long it waits after something that went wrong, so that a server that is ill is not asked all the time."""

_MOST_OFFERS = 10
"""How often an answer is offered of which the server refuses parts."""

_TIMES = "round %s: %.3f s of work, %.3f s to receive it, %.3f s to send the answer"

_logger = logging.getLogger(__name__)


Answering = Callable[[Message, Context], Message]
"""What a client app does."""


class Uplink(NamedTuple):
    """A connection to the server, as Flower makes it: the node's number there, and what can be asked."""

    node: int
    receive: Callable[[], tuple[Message, Any] | None]
    send: Callable[[Message, Any, float], tuple[set[str], str]]
    get_run: Callable[[int], Any]
    get_app: Callable[[str, int], Any]
    pull: Callable[[int, str], bytes]
    push: Callable[[int, str, str, bytes], None]
    confirm: Callable[[int, str], None]


class Stopped(BaseException):
    """The node was asked to stop; it may come in the middle of training."""


def serve(node: NodeConfig, app: ClientApp) -> None:
    """Answers the server's messages with `app`, one after another, until SIGTERM or SIGINT.

    What the server asks for is trained in this process, so the base is loaded once. A message that was interrupted is
    not answered: the server hears of it by its deadline. `http://127.0.0.1:PORT/health` says whether it is well.

    Raises:
        ConfigError: the node's key cannot be read.
        SystemExit: the server cannot be reached, or does not take this node; Flower says why.
    """
    guard(int(node.limits.memory_gigabytes * 10**9) or _MOST_BYTES)
    pulse = Pulse()

    def working(message: Message, context: Context) -> Message:
        with pulse.at_work():
            return app(message, context)

    with _stoppable(), connected(node) as uplink, shown(pulse, node.port):
        _logger.info("connected as node %d", uplink.node)
        try:
            sent, waiting_since = UNSENT, time.monotonic()
            while True:
                done = answer_next(uplink, working, {**_node_config(node), f"{PHASE}send": sent})
                if done != UNSENT:
                    pulse.beat()
                if done is None:
                    time.sleep(pause_after(time.monotonic() - waiting_since))
                else:
                    sent, waiting_since = done, time.monotonic()
        except Stopped:
            _logger.info("stopped")


def pause_after(waited_seconds: float) -> float:
    """The pause before the node asks again: a tenth of the time that it has waited for a message, within bounds.

    So no message waits a tenth longer than it must, and a node that is idle costs its line little.
    """
    return min(MOST_POLL_SECONDS, max(POLL_SECONDS, waited_seconds / 10))


def answer_next(uplink: Uplink, app: Answering, node_config: dict[str, Any]) -> float | None:
    """The seconds that it took to send the answer to the next message, UNSENT for one refused with a line in the log.

    None where there was no message. The app finds the seconds of receiving it in its node config.
    """
    message = None
    try:
        received = uplink.receive()
        if received is None:
            return None
        begun = time.perf_counter()
        message = _whole(uplink, *received)
        started = time.perf_counter()
        config = {**node_config, f"{PHASE}receive": started - begun}
        reply = _reply(app, message, Context(message.metadata.run_id, uplink.node, config, RecordDict(), {}))
        answered = time.perf_counter()
        _send(uplink, reply, answered - started)
        sent = time.perf_counter()
        _logger.info(_TIMES, message.metadata.group_id or "0", answered - started, started - begun, sent - answered)
        return sent - answered
    except RunNotRunningException:
        _logger.info("a message of a run that has ended is passed over")
    except Exception as error:  # a server that sends nonsense, or a line that is down, must not end the node
        _logger.warning("a message could not be %s: %s", "read" if message is None else "answered", _said(error))
        time.sleep(_ERROR_SECONDS)
    return UNSENT


@contextmanager
def connected(node: NodeConfig) -> Iterator[Uplink]:
    """A connection to the node's server, kept alive by heartbeats; the server hears of its end.

    Raises:
        ConfigError: the node's key cannot be read.
        SystemExit: there is no connection; Flower says why.
    """
    key = None if node.server.insecure else private_key(Path(node.server.private_key))
    keys = None if key is None else (key, key.public_key())
    roots = None if node.server.insecure else node.server.root_certificates
    server = node.server
    with patient_connection(server.address, server.insecure, roots, keys, server.heartbeat_seconds) as found:
        yield Uplink(*found)


def app_named(name: str) -> ClientApp:
    """The Flower client that `module:attribute` names.

    Raises:
        ConfigError: there is none.
    """
    module, _, attribute = name.partition(":")
    try:
        found: Any = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            sentence(
                "--app", expected="module:attribute", found=f"{name!r} ({error})", remedy="name a client app, or none"
            )
        ) from error
    if not isinstance(found, ClientApp):
        raise ConfigError(
            sentence("--app", expected="a Flower ClientApp", found=type(found).__name__, remedy="name another")
        )
    return found


def _whole(uplink: Uplink, head: Message, tree: Any) -> Message:
    """The message whose head has come, with its content; the server is told that it is here.

    Raises:
        ValueError: it has more parts than any request of ours.
    """
    run, name = head.metadata.run_id, head.metadata.message_id
    count = sum(1 for _ in iterate_object_tree(tree))
    if count > MOST_OBJECTS:
        raise ValueError(f"it has {count} parts, and a request has at most {MOST_OBJECTS}")
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, run, uplink.node
    message = pull_and_inflate_object_from_tree(
        tree,
        lambda part: uplink.pull(run, part),
        lambda part: uplink.confirm(run, part),
        return_type=Message,
        initial_backoff=POLL_SECONDS / 4,  # a message is there a little before its parts are
    )
    message.metadata.__dict__["_message_id"] = name
    return message


def _reply(app: Answering, message: Message, context: Context) -> Message:
    try:
        return app(message, context)
    except Exception as error:
        _logger.exception("the client failed")
        reason = f"{type(error).__name__}; the node's log says more"
        return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=message)


def _send(uplink: Uplink, reply: Message, seconds: float) -> None:
    """The server has all of `reply`, each part once.

    A part that is there already is refused when it is sent again, because word of its arrival was lost on the way; so
    after a refusal the server is asked what it still lacks.

    Raises:
        ConnectionError: it refuses parts time and again.
    """
    reply.metadata.__dict__["_message_id"] = reply.object_id
    with no_object_id_recompute():
        tree, parts = get_object_tree(reply), get_all_nested_objects(reply)
        for attempt in range(_MOST_OFFERS):
            wanted, session = uplink.send(reply, tree, 0.0 if attempt else seconds)
            push = functools.partial(uplink.push, reply.metadata.run_id, session)
            if _pushed(push, {name: part for name, part in parts.items() if name in wanted}):
                return
    raise ConnectionError("the server refuses parts of the answer")


def _pushed(push: Callable[[str, bytes], None], parts: Mapping[str, InflatableObject]) -> bool:
    """Whether the server took all of the parts; those that it refuses do not keep the others back."""
    refused: list[str] = []

    def push_one(name: str, content: bytes) -> None:
        try:
            push(name, content)
        except ObjectPushError:
            refused.append(name)

    push_object_contents_from_iterable(((name, part.deflate()) for name, part in parts.items()), push_one)
    return not refused


def _node_config(node: NodeConfig) -> dict[str, Any]:
    rank = {"rank": node.rank} if node.rank else {}
    return {"partition-id": node.partition, **rank}


def _said(error: BaseException) -> str:
    """An error in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


@contextmanager
def _stoppable() -> Iterator[None]:
    """Inside, SIGTERM and SIGINT raise `Stopped` in the main thread, once."""

    def stop(*_: object) -> None:
        for each in before:
            signal.signal(each, signal.SIG_IGN)
        raise Stopped

    before = {each: signal.signal(each, stop) for each in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
