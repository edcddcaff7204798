"""A node that stays warm: one process that speaks Flower's fleet protocol and runs this installation's client.

Flower's own SuperNode starts a process for every message, which loads torch, transformers and the base again, and it
runs whatever code the server has bundled with the run. This node keeps the model between messages and runs only what
is installed here: of what the server sends it reads messages, and nothing else. To the server it is a SuperNode.

It leans on Flower's `fleet_http_connection`, which is no public interface; versions are pinned, and a test holds it.
"""

from __future__ import annotations

import importlib
import logging
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import (
    pull_and_inflate_object_from_tree,
    push_object_contents_from_iterable,
)
from flwr.supercore.run import RunNotRunningException
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode.fleet_http_connection import http_request_response

from fedpeft.config.node import NodeConfig
from fedpeft.engines.flower_guard import guard
from fedpeft.errors import ConfigError, sentence

POLL_SECONDS = 0.2
"""How long the node waits before it asks again whether there is a message."""

_MOST_BYTES = 8 * 10**9
"""The greatest array that is read where the node's file has no bound on memory."""

_ERROR_SECONDS = 2.0
"""How long it waits after something that went wrong, so that a server that is ill is not asked all the time."""

MOST_OBJECTS = 1024
"""A request is a handful of objects and one more for each 5 MB; what has more is not ours."""

_TIMES = "round %s: %.3f s of work, %.3f s to receive it, %.3f s to send the answer"

_logger = logging.getLogger(__name__)


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
    not answered: the server hears of it by its deadline.

    Raises:
        ConfigError: the node's key cannot be read.
        SystemExit: the server cannot be reached, or does not take this node; Flower says why.
    """
    guard(int(node.limits.memory_gigabytes * 10**9) or _MOST_BYTES)
    with _stoppable(), connected(node) as uplink:
        _logger.info("connected as node %d", uplink.node)
        try:
            while True:
                if not answer_next(uplink, app, _node_config(node)):
                    time.sleep(POLL_SECONDS)
        except Stopped:
            _logger.info("stopped")


def answer_next(uplink: Uplink, app: ClientApp, node_config: dict[str, Any]) -> bool:
    """Whether there was a message; if so, it has been answered, or refused with a line in the log."""
    message = None
    try:
        received = uplink.receive()
        if received is None:
            return False
        begun = time.perf_counter()
        message = _whole(uplink, *received)
        started = time.perf_counter()
        reply = _reply(app, message, Context(message.metadata.run_id, uplink.node, node_config, RecordDict(), {}))
        answered = time.perf_counter()
        _send(uplink, reply, answered - started)
        sent = time.perf_counter()
        _logger.info(_TIMES, message.metadata.group_id or "0", answered - started, started - begun, sent - answered)
    except RunNotRunningException:
        _logger.info("a message of a run that has ended is passed over")
    except Exception as error:  # a server that sends nonsense, or a line that is down, must not end the node
        _logger.warning("a message could not be %s: %s", "read" if message is None else "answered", _said(error))
        time.sleep(_ERROR_SECONDS)
    return True


@contextmanager
def connected(node: NodeConfig) -> Iterator[Uplink]:
    """A connection to the node's server, kept alive by heartbeats; the server hears of its end.

    Raises:
        ConfigError: the node's key cannot be read.
        SystemExit: there is no connection; Flower says why.
    """
    key = None if node.server.insecure else _private_key(Path(node.server.private_key))
    keys = None if key is None else (key, key.public_key())
    roots = None if node.server.insecure else node.server.root_certificates
    with http_request_response(node.server.address, node.server.insecure, roots, keys) as found:
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


def _reply(app: ClientApp, message: Message, context: Context) -> Message:
    try:
        return app(message, context)
    except Exception as error:
        _logger.exception("the client failed")
        reason = f"{type(error).__name__}; the node's log says more"
        return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=message)


def _send(uplink: Uplink, reply: Message, seconds: float) -> None:
    reply.metadata.__dict__["_message_id"] = reply.object_id
    with no_object_id_recompute():
        tree = get_object_tree(reply)
        parts = get_all_nested_objects(reply)
        wanted, session = uplink.send(reply, tree, seconds)
        run = reply.metadata.run_id
        push_object_contents_from_iterable(
            ((name, part.deflate()) for name, part in parts.items() if name in wanted),
            push_object_fn=lambda name, content: uplink.push(run, session, name, content),
        )


def _node_config(node: NodeConfig) -> dict[str, Any]:
    rank = {"rank": node.rank} if node.rank else {}
    return {"partition-id": node.partition, **rank}


def _private_key(path: Path) -> ec.EllipticCurvePrivateKey:
    try:
        key = load_ssh_private_key(path.read_bytes(), None)
    except (OSError, ValueError) as error:
        raise _no_key(path, str(error).splitlines()[0]) from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise _no_key(path, type(key).__name__)
    return key


def _no_key(path: Path, found: str) -> ConfigError:
    remedy = "make one with python -m server.make_certificates"
    place = f"server.private_key, {path}"
    return ConfigError(sentence(place, expected="an ECDSA key in OpenSSH's form", found=found, remedy=remedy))


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
