"""The client of a Flower federation, in a Ray simulation and on a real node."""

from __future__ import annotations

import functools
import logging
import os
import re
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedpeft.assets import cache_folder
from fedpeft.client import Site
from fedpeft.config import RunConfig, digest
from fedpeft.config.node import NodeConfig, load_node
from fedpeft.config.training import NODE_SETTINGS, ModelConfig
from fedpeft.data.fields import Row
from fedpeft.engines.flower_grid import INTRODUCE, INTRODUCTION
from fedpeft.engines.flower_messages import to_packet, to_records, to_settings
from fedpeft.engines.local import answer
from fedpeft.errors import ConfigError, DataError, FedPeftError, PacketError, sentence
from fedpeft.experiment import SiteRows, SiteTask, site_of, task_of
from fedpeft.memory import FolderMemory
from fedpeft.nodes import (
    MODEL_VARIABLE,
    WITHOUT_A_FILE,
    followed,
    require_admissible,
    require_memory,
    require_protections,
    require_rank,
    require_room,
    rows_of,
    within,
)
from fedpeft.tasks import Example, Task
from fedpeft.training import TorchLearner, training_memory_bytes, use_threads
from fedpeft.version import VERSION
from fedpeft.wire import Packet

__all__ = ["MODEL_VARIABLE", "NODE_VARIABLE", "Example", "Own", "Row", "Task", "client_app", "task_of"]

NODE_VARIABLE = "FEDPEFT_NODE"
"""Names the file of a node's own settings, unless its `--node-config` does so with `node="PATH"`."""

_logger = logging.getLogger(__name__)

_PATH = re.compile(r"(?<![\w:/.])~?/[^\s/'\",;:]+/[^\s'\",;:]*")
"""An absolute path of two parts or more, in a text."""


class Own(NamedTuple):
    """What a site brings along: `rows(config)` and `task(config)`; None for what the run's settings say."""

    rows: SiteRows | None = None
    task: SiteTask | None = None


def client_app(own_rows: SiteRows | None = None, own_task: SiteTask | None = None) -> ClientApp:
    """A Flower client that trains on `own_rows(config)`, or on its share of the bundled data.

    `own_task(config)` takes the place of the run's task on this site: it may read rows, make batches and take a loss
    in its own way, for the head that the run's task has. What the server measures stays the run's.

    Whatever goes wrong for a reason that a person can mend is told to the server as a packet of kind `failure`.
    """
    app = ClientApp()
    respond = functools.partial(_respond, Own(own_rows, own_task))
    for register in (app.query, app.train, app.evaluate):
        register()(respond)
    return app


def _respond(own: Own, message: Message, context: Context) -> Message:
    try:
        packet = _answer(own, message, context)
    except PacketError as error:
        packet = Packet("failure", {"reason": str(error)})
    except FedPeftError as error:
        packet = Packet("failure", {"reason": _told(error)})
    except Exception as error:  # a message that no server of ours sends must not end the node
        _logger.exception("a message could not be answered")
        told = str(error) if _simulated() else "its own log says more"
        packet = Packet("failure", {"reason": f"node: {type(error).__name__}; {told}"})
    if packet.kind == "failure" and not _simulated():
        _logger.warning("this node refused or failed: %s", packet.manifest.get("reason"))
    return Message(to_records(packet), reply_to=message)


def _told(error: FedPeftError) -> str:
    """What the server is told of an error; what a real node's rows hold, and where its files are, stays in its log."""
    if _simulated():
        return str(error)
    _logger.warning("%s", error)
    if not isinstance(error, DataError):
        return _PATH.sub("(a path of this node)", str(error))
    return sentence(
        "rows of this node",
        expected="rows that the run's task can use",
        found="some that it cannot",
        remedy="ask its operator, whose log says which and why",
    )


@dataclass(frozen=True)
class _Node:
    """What a real node's operator has decided, in its file and its `--node-config`, which wins."""

    config: NodeConfig
    held: tuple[tuple[str, Any], ...]
    rank: int


def _answer(own: Own, message: Message, context: Context) -> Packet:
    started = time.monotonic()
    request = to_packet(message.content)
    if _simulated():
        if request.kind == INTRODUCE:
            return _introduction(_partition(context, None))
        config = to_settings(message.content)
        use_threads(config.compute.threads)
        site = _site(config, config, _partition(context, None), own)
        return answer(request, site, FolderMemory(Path(config.out) / "memories"))
    file = _node_file(context)
    node = _node(context, file)
    partition = _partition(context, node.config.partition if file else None)
    if request.kind == INTRODUCE:
        return _introduction(partition)
    config = to_settings(message.content)
    require_admissible(config, node.config)
    require_protections(config, node.config.required)
    require_rank(request, node.rank)
    site = _real_site(config, partition, own, node)
    return answer(request, _limited(site, node, request.kind, started), FolderMemory(cache_folder() / "nodes"))


def _introduction(partition: int) -> Packet:
    return Packet(INTRODUCTION, {"version": VERSION, "partition": partition})


def _real_site(config: RunConfig, partition: int, own: Own, node: _Node) -> Site:
    """The client of `partition` as this node follows the settings."""
    rows = own.rows or rows_of(node.config)
    local = followed(config, rows, node.config, dict(node.held))
    use_threads(local.compute.threads)
    require_room(local.model, node.config.limits)
    return _site(config, local, partition, own._replace(rows=rows))


def _limited(site: Site, node: _Node, kind: str, started: float) -> Site:
    """`site` with the node's rank and memory, and within its limits.

    Raises:
        PacketError: training would take more memory than the node gives.
    """
    learner, limits = site.learner, node.config.limits
    memory = training_memory_bytes(learner)
    most = int(limits.memory_gigabytes * 1e9) or memory
    if isinstance(learner, TorchLearner):
        if kind == "fit":
            require_memory(learner, limits)
        learner = replace(learner, task=within(learner.task, limits, started))
    return replace(site, learner=learner, rank=node.rank, memory_bytes=min(memory, most))


def _node_file(context: Context) -> str:
    """The path of the node's file, empty where there is none."""
    named = context.node_config.get("node", "")
    if not isinstance(named, str):
        raise ConfigError(
            sentence(
                "node-config, node",
                expected="the path of a node's file",
                found=repr(named),
                remedy='write node="PATH" in --node-config',
            )
        )
    return named or os.environ.get(NODE_VARIABLE, "")


def _node(context: Context, file: str) -> _Node:
    try:
        config = load_node(Path(file)) if file else WITHOUT_A_FILE
    except ConfigError as error:
        _logger.warning("node file %s: %s", file, error)
        raise ConfigError(
            sentence(
                "node file",
                expected="settings that are valid",
                found="a mistake",
                remedy="ask its operator, whose log says which",
            )
        ) from error
    return _Node(config, tuple(sorted(_held(context).items())), _node_rank(context) or config.rank)


def _held(context: Context) -> dict[str, Any]:
    """How this node holds and computes the base, where it says so itself: its `--node-config` may name such settings.

    Raises:
        ConfigError: a value is not one that the setting takes.
    """
    given = {key: context.node_config[key] for key in NODE_SETTINGS if key in context.node_config}
    for key, value in given.items():
        kind = type(getattr(ModelConfig(), key))
        try:
            fits = isinstance(value, kind) and bool(ModelConfig(**{key: value}))
        except ConfigError as error:
            raise ConfigError(f"node-config, {error}") from error
        if not fits:
            remedy = f"write {key}={'true' if kind is bool else 'TEXT'} in --node-config, a text in quotes"
            raise ConfigError(sentence(f"node-config, {key}", expected=kind.__name__, found=repr(value), remedy=remedy))
    return given


@functools.lru_cache(maxsize=256)
def _site(config: RunConfig, local: RunConfig, partition: int, own: Own) -> Site:
    """The client of `partition`, kept for the life of the process; the server knows it by `config`."""
    return replace(site_of(local, partition, own.rows, own.task), config=digest(config))


def _partition(context: Context, own: int | None) -> int:
    """The node's number: that of its `--node-config`, or `own`."""
    partition = context.node_config.get("partition-id", own)
    if isinstance(partition, bool) or not isinstance(partition, int) or partition < 0:
        raise ConfigError(
            sentence(
                "node-config, partition-id",
                expected="an integer from 0",
                found=repr(partition),
                remedy='start the node with --node-config "partition-id=0"',
            )
        )
    return partition


def _node_rank(context: Context) -> int:
    """The greatest rank that this node says it can train at; 0 where it says none."""
    rank = context.node_config.get("rank", 0)
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 0:
        raise ConfigError(
            sentence(
                "node-config, rank",
                expected="an integer from 1",
                found=repr(rank),
                remedy='start the node with --node-config "partition-id=0 rank=4"',
            )
        )
    return rank


def _simulated() -> bool:
    """Whether this process is an actor of a Ray simulation, on the machine of whoever started it."""
    ray = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())
