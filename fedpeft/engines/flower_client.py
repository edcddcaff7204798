"""The client of a Flower federation, in a Ray simulation and on a real node."""

from __future__ import annotations

import functools
import gc
import logging
import os
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedpeft.assets import cache_folder
from fedpeft.client import Learner, Site
from fedpeft.config import RunConfig, digest
from fedpeft.config.node import NodeConfig, load_node
from fedpeft.config.training import NODE_SETTINGS, ModelConfig
from fedpeft.data.fields import Row
from fedpeft.engines.flower_door import INTRODUCE, INTRODUCTION, TURNED_AWAY
from fedpeft.engines.flower_messages import to_packet, to_records, to_settings
from fedpeft.engines.local import answer
from fedpeft.errors import ConfigError, DataError, FedPeftError, ModelError, PacketError, sentence
from fedpeft.experiment import SiteRows, SiteTask, adapted_model, site_of, task_of
from fedpeft.kept import kept
from fedpeft.loaded import digest_of_base, keeps
from fedpeft.logs import one_line
from fedpeft.memory import FolderMemory
from fedpeft.node_key import peer_keys, private_key
from fedpeft.nodes import (
    MODEL_VARIABLE,
    WITHOUT_A_FILE,
    followed,
    make_room,
    require_admissible,
    require_memory,
    require_protections,
    require_rank,
    require_room,
    rows_of,
    within,
)
from fedpeft.privacy.secure.keys import pinned, signing
from fedpeft.secure_client import Identity
from fedpeft.skew import Installation
from fedpeft.tasks import Example, Task
from fedpeft.training import TorchLearner, training_memory_bytes, use_threads
from fedpeft.wire import PHASE, PHASES, Packet

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
        partition = _partition(context, None)
        if request.kind in (INTRODUCE, TURNED_AWAY):
            return _at_the_door(request, partition, lambda: _threaded(to_settings(message.content)))
        config = _threaded(to_settings(message.content))
        site = _site(config, config, partition, own)
        return answer(request, site, FolderMemory(Path(config.out) / "memories"))
    file = _node_file(context)
    node = _node(context, file)
    partition = _partition(context, node.config.partition if file else None)
    if request.kind in (INTRODUCE, TURNED_AWAY):
        return _at_the_door(request, partition, lambda: _local(to_settings(message.content), own, node))
    config = to_settings(message.content)
    local = _local(config, own, node)
    require_rank(request, node.rank)
    site = _site(config, local, partition, own._replace(rows=own.rows or rows_of(node.config)))
    if request.kind == "fit" and isinstance(site.learner, TorchLearner):
        _make_room(local, node, require_memory(site.learner, node.config.limits))
    limits = node.config.limits
    memories = FolderMemory(cache_folder() / "nodes", limits.kept_runs, int(limits.kept_gigabytes * 1e9))
    return answer(request, _limited(site, node, started), memories, _transfers(context))


def _make_room(local: RunConfig, node: _Node, wanted_bytes: int = 0) -> None:
    """What other runs have left in this process's memory is let go where it is in the way, oldest first."""
    make_room(local, node.config.limits, wanted_bytes)
    stale = [key for key, site in _site.kept() if not _has_its_model(site.learner)]
    for key in stale:
        _site.let_go(*key)
    if stale:
        gc.collect()  # a model holds itself in circles


def _has_its_model(learner: Learner) -> bool:
    """Whether the model of a kept client is kept too, so that keeping the client costs no more."""
    return not isinstance(learner, TorchLearner) or keeps(learner.adapted)


def _transfers(context: Context) -> dict[str, float]:
    """The seconds of sending and receiving that a node which stays warm has measured."""
    found = {phase: context.node_config.get(f"{PHASE}{phase}") for phase in PHASES}
    return {phase: float(seconds) for phase, seconds in found.items() if isinstance(seconds, float)}


def _at_the_door(request: Packet, partition: int, local: Callable[[], RunConfig]) -> Packet:
    """Who this node is and what it has; what the server says of it before it may take part is logged.

    A run that this node cannot or will not prepare for, by the settings `local()`, has no digests: its requests are
    answered with the reason.
    """
    if request.kind == TURNED_AWAY:
        why = one_line(str(request.manifest.get("reason", "it gives no reason")))
        _logger.warning("the server does not let this node take part: %s", ConfigError(why))
        return Packet(INTRODUCTION, {**Installation().fields, "partition": partition})
    own = Installation()
    if request.manifest.get("version") == own.fedpeft:
        try:
            own = _prepared(local())
        except Exception as error:  # whatever it is, the server hears of it when it asks for more
            _logger.info("this node could not prepare for the run: %s", error)
    return Packet(INTRODUCTION, {**own.fields, "partition": partition})


def _prepared(local: RunConfig) -> Installation:
    """What this node has for a run; of a base that the adapter does not fit, its digest alone.

    Raises:
        FedPeftError: it has no base for it.
    """
    try:
        spec = adapted_model(local).spec
    except ModelError:
        return Installation(base=digest_of_base(local))
    return Installation(base=spec.base_model, adapter=spec.digest)


def _local(config: RunConfig, own: Own, node: _Node) -> RunConfig:
    """The settings as this node follows them.

    Raises:
        PacketError: it does not.
    """
    require_admissible(config, node.config)
    require_protections(config, node.config.required)
    local = _threaded(followed(config, own.rows or rows_of(node.config), node.config, dict(node.held)))
    require_room(local.model, node.config.limits)
    _make_room(local, node)
    return local


def _threaded(config: RunConfig) -> RunConfig:
    """`config`, with as many threads of torch as it asks for: what is drawn and computed may depend on them."""
    use_threads(config.compute.threads)
    return config


def _limited(site: Site, node: _Node, started: float) -> Site:
    """`site` with the node's rank and memory, and within its limits."""
    learner, limits = site.learner, node.config.limits
    memory = training_memory_bytes(learner)
    most = int(limits.memory_gigabytes * 1e9) or memory
    if isinstance(learner, TorchLearner):
        learner = replace(learner, task=within(learner.task, limits, started))
    least, identity = node.config.required.least_cohort, _identity(node.config)
    return replace(
        site, learner=learner, rank=node.rank, memory_bytes=min(memory, most), least_cohort=least, identity=identity
    )


def _identity(node: NodeConfig) -> Identity:
    """Who the node is in secure sums.

    Raises:
        ConfigError: a key that its file names cannot be read.
    """
    if not node.peers:
        return Identity()
    return Identity(signing(private_key(Path(node.server.private_key))), pinned(peer_keys(Path(node.peers))))


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


@kept(256)
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
