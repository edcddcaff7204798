"""The client of a Flower federation, in a Ray simulation and on a real node."""

from __future__ import annotations

import functools
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedpeft.assets import cache_folder
from fedpeft.client import Site
from fedpeft.config import RunConfig, digest
from fedpeft.config.data import Bundled
from fedpeft.config.training import NODE_SETTINGS, ModelConfig
from fedpeft.data.fields import Row
from fedpeft.engines.flower_grid import INTRODUCE, INTRODUCTION
from fedpeft.engines.flower_messages import to_packet, to_records, to_settings
from fedpeft.engines.local import answer
from fedpeft.errors import ConfigError, FedPeftError, PacketError, sentence
from fedpeft.experiment import SiteRows, SiteTask, site_of, task_of
from fedpeft.memory import FolderMemory
from fedpeft.tasks import Example, Task
from fedpeft.training import training_memory_bytes, use_threads
from fedpeft.version import VERSION
from fedpeft.wire import Packet

__all__ = ["MODEL_VARIABLE", "Example", "Own", "Row", "Task", "client_app", "on_node", "task_of"]

MODEL_VARIABLE = "FEDPEFT_MODEL"
"""Names the folder of the base model on a node, where the server's settings name a folder of the server's."""

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


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
    except FedPeftError as error:
        packet = Packet("failure", {"reason": str(error)})
    return Message(to_records(packet), reply_to=message)


def _answer(own: Own, message: Message, context: Context) -> Packet:
    partition = _partition(context)
    request = to_packet(message.content)
    if request.kind == INTRODUCE:
        return Packet(INTRODUCTION, {"version": VERSION, "partition": partition})
    config = to_settings(message.content)
    use_threads(config.compute.threads)
    if _simulated():
        return answer(request, _site(config, config, partition, own), FolderMemory(Path(config.out) / "memories"))
    site = _site(config, on_node(config, own.rows, _profile(context)), partition, own)
    profiled = replace(site, rank=_node_rank(context), memory_bytes=training_memory_bytes(site.learner))
    return answer(request, profiled, FolderMemory(cache_folder() / "nodes"))


def on_node(config: RunConfig, own_rows: SiteRows | None, profile: Mapping[str, Any] | None = None) -> RunConfig:
    """The settings that a real node follows: `config` without any path of the server's, with what it sets for itself.

    Raises:
        PacketError: they name a file or folder, and the node has no rows or model of its own.
    """
    if own_rows is None and not isinstance(config.data.origin.chosen, Bundled):
        raise PacketError(
            sentence(
                f"data.origin.source {config.data.origin.name}",
                expected="bundled, because nothing that the server sends can name data on a node",
                found=config.data.origin.name,
                remedy="give the node its own rows in clients/app.py",
            )
        )
    model = replace(config.model, source=_model_source(config.model.source), **(profile or {}))
    return replace(config, out="", model=model)


def _profile(context: Context) -> dict[str, Any]:
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


def _model_source(source: str) -> str:
    own = os.environ.get(MODEL_VARIABLE)
    packaged = re.fullmatch(r"asset:[\w-]+", source) is not None
    named = _HUB_NAME.fullmatch(source) is not None and not Path(source).exists()
    if packaged or (named and not own):
        return source
    if own:
        return own
    raise PacketError(
        sentence(
            "model.source",
            expected="asset:NAME or a Hub name, because nothing that the server sends can name a folder on a node",
            found=repr(source),
            remedy=f"name the node's own folder in {MODEL_VARIABLE}",
        )
    )


@functools.lru_cache(maxsize=256)
def _site(config: RunConfig, local: RunConfig, partition: int, own: Own) -> Site:
    """The client of `partition`, kept for the life of the process; the server knows it by `config`."""
    return replace(site_of(local, partition, own.rows, own.task), config=digest(config))


def _partition(context: Context) -> int:
    partition = context.node_config.get("partition-id")
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
