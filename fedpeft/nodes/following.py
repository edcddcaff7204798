"""How a node follows the settings of a run: without any path of the server's, and with what it sets for itself."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedpeft.config import RunConfig
from fedpeft.config.data import Bundled
from fedpeft.config.fields import Choice
from fedpeft.config.node import HeldModel, NodeConfig
from fedpeft.config.observation import ObservationConfig
from fedpeft.config.training import TrainingConfig
from fedpeft.data.rows import Row
from fedpeft.data.sources import read
from fedpeft.errors import PacketError, sentence
from fedpeft.experiment import SiteRows

MODEL_VARIABLE = "FEDPEFT_MODEL"
"""Names the folder of the base model on a node whose file names none."""

WITHOUT_A_FILE = NodeConfig(model=HeldModel(from_hub=True))
"""What a node decides that has no file."""

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def followed(
    config: RunConfig,
    own_rows: SiteRows | None,
    node: NodeConfig = WITHOUT_A_FILE,
    held: Mapping[str, Any] | None = None,
) -> RunConfig:
    """`config` as a real node follows it.

    `held` is how the base is held, over what the node's file says. A batch that is too great for the node is computed
    in parts of equal size.

    Raises:
        PacketError: the settings name a file or folder, or a Hub model that the node does not take, and the node has no
            rows or model of its own.
    """
    if own_rows is None and not isinstance(config.data.origin.chosen, Bundled):
        raise PacketError(
            sentence(
                f"data.origin.source {config.data.origin.name}",
                expected="bundled, because nothing that the server sends can name data on a node",
                found=config.data.origin.name,
                remedy="give the node its own rows in its node file, or in clients/app.py",
            )
        )
    limits, batch = node.limits, config.evaluation.batch_size
    return replace(
        config,
        out="",
        model=replace(config.model, source=_source(config.model.source, node), **{**node.model.own, **(held or {})}),
        training=in_memory(in_parts(config.training, limits.batch_size), limits.memory_gigabytes),
        evaluation=replace(config.evaluation, batch_size=min(batch, limits.batch_size or batch)),
        compute=replace(
            config.compute, threads=limits.threads or min(config.compute.threads, os.cpu_count() or 1), workers=1
        ),
        observation=ObservationConfig(),
    )


def in_parts(training: TrainingConfig, most: int) -> TrainingConfig:
    """`training` with the same examples in a step, at most `most` (0: no bound) at once, the parts of equal size."""
    size = training.batch_size
    if not 0 < most < size:
        return training
    part = max(part for part in range(1, most + 1) if size % part == 0)
    return replace(training, batch_size=part, accumulation=training.accumulation * (size // part))


def in_memory(training: TrainingConfig, most: float) -> TrainingConfig:
    """`training` that keeps no more activations than fit into a quarter of `most` gigabytes (0: no bound).

    What is trained does not depend on how many are kept.
    """
    return replace(training, cache_gigabytes=min(training.cache_gigabytes, most / 4 or training.cache_gigabytes))


def rows_of(node: NodeConfig) -> SiteRows | None:
    """How to get at the rows that the node's file names; None where it names none."""
    return None if isinstance(node.data.chosen, Bundled) else _reader(node.data)


@functools.lru_cache(maxsize=4)
def _reader(data: Choice) -> SiteRows:
    """The same function for the same settings, so that a site made with it can be kept."""

    def rows(config: RunConfig) -> list[Row]:
        return read(data.chosen, config.task.chosen.roles)

    return rows


def _source(source: str, node: NodeConfig) -> str:
    own = node.model.folder or os.environ.get(MODEL_VARIABLE)
    packaged = re.fullmatch(r"asset:[\w-]+", source) is not None
    named = _HUB_NAME.fullmatch(source) is not None and not Path(source).exists()
    if packaged or (named and node.model.from_hub and not own):
        return source
    if own:
        return own
    remedy = "set model.from_hub=true in the node's file, or model.folder" if named else _NAME_A_FOLDER
    raise PacketError(
        sentence(
            "model.source",
            expected="asset:NAME or a Hub name that the node takes, because nothing that the server sends can name a "
            "folder on a node",
            found=repr(source),
            remedy=remedy,
        )
    )


_NAME_A_FOLDER = f"name the node's own folder as model.folder in its file, or in {MODEL_VARIABLE}"
