"""What one round's work may take of a node: memory, time, and the rank that it trains at."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedpeft.base_weights import held_bytes
from fedpeft.bases import model_path
from fedpeft.config import RunConfig
from fedpeft.config.node import LimitsConfig
from fedpeft.config.training import ModelConfig
from fedpeft.errors import FederationError, PacketError, sentence
from fedpeft.loaded import keep_within
from fedpeft.tasks import Encoded, Task
from fedpeft.training import LIBRARY_BYTES, TorchLearner, fit_memory_bytes
from fedpeft.wire import Packet

_BYTES = {"float32": 4.0, "bfloat16": 2.0, "int8": 1.0, "nf4": 0.5}
"""Bytes of a weight by the format that the base is held in."""


def require_rank(request: Packet, rank: int) -> None:
    """The request asks for no training at a rank above `rank` (0: no bound).

    Raises:
        PacketError: it does.
    """
    asked = request.manifest.get("rank", 0)
    if rank and request.kind == "fit" and isinstance(asked, int) and asked > rank:
        raise PacketError(
            sentence(
                f"{request.kind} request, rank",
                expected=f"at most {rank}, the greatest that this node trains at",
                found=asked,
                remedy="set federation.ranks=declared, or lower the adapter's rank",
            )
        )


def require_room(model: ModelConfig, limits: LimitsConfig) -> None:
    """The base alone fits into the node's memory, as far as the size of its files tells before it is loaded.

    Raises:
        PacketError: it does not.
    """
    least = _least_bytes(model)
    if limits.memory_gigabytes and least > limits.memory_gigabytes * 1e9:
        raise _too_much(f"at least {least / 1e9:.2f} GB for the base alone", limits)


def make_room(config: RunConfig, limits: LimitsConfig, wanted_bytes: int = 0) -> None:
    """Models that this process keeps beside that of `config`, and `wanted_bytes`, fit into the node's memory.

    0 `wanted_bytes` are those of the base of `config` alone, as far as its files tell. Models that were not asked for
    the longest are let go as long as there is too much.
    """
    if limits.memory_gigabytes:
        wanted = wanted_bytes or int(_least_bytes(config.model))
        keep_within(config, int(limits.memory_gigabytes * 1e9) - wanted)


def needed_bytes(learner: TorchLearner) -> int:
    """Bytes that training takes at its peak, with the base, what is kept and, where they share its memory, libraries.

    A batch of many examples is not tried, but reckoned from two: the two longest, and the longest beside the shortest,
    which is padded.
    """
    batch = min(learner.settings.batch_size, len(learner.examples))
    ordered = sorted(learner.examples, key=lambda example: -example.size)
    pairs = (ordered[:2], [ordered[0], ordered[-1]]) if batch > 1 else (ordered[:1],)
    fixed, cache = 16 * learner.adapted.spec.parameters, int(learner.settings.cache_gigabytes * 1e9)
    most = max((_fit_bytes(learner, tuple(pair)) - fixed) / len(pair) for pair in pairs)
    libraries = 0 if learner.adapted.device.type == "cuda" else LIBRARY_BYTES
    return libraries + held_bytes(learner.adapted.model) + cache + fixed + int(most * batch)


def require_memory(learner: TorchLearner, limits: LimitsConfig) -> int:
    """The bytes that training takes, which fit into the memory that the node gives; 0 where it sets no bound.

    Raises:
        PacketError: they do not.
    """
    if not limits.memory_gigabytes:
        return 0
    needed = needed_bytes(learner)
    if needed > limits.memory_gigabytes * 1e9:
        raise _too_much(f"{needed / 1e9:.2f} GB", limits)
    return needed


def within(task: Task, limits: LimitsConfig, started: float, now: Callable[[], float] = time.monotonic) -> Task:
    """`task`, whose batches end in a refusal once `round_minutes` have passed since `started`, in seconds of `now`."""
    if not limits.round_minutes:
        return task

    def in_time(compute: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
        def computed(model: Any, batch: Any) -> Any:
            if now() - started > 60 * limits.round_minutes:
                raise FederationError(
                    sentence(
                        "round on this node",
                        expected=f"at most {limits.round_minutes:g} minutes, its limits.round_minutes",
                        found="more",
                        remedy="lower training.steps, or leave this node out",
                    )
                )
            return compute(model, batch)

        return computed

    losses = task.losses and in_time(task.losses)
    return task._replace(loss=in_time(task.loss), score=in_time(task.score), losses=losses)


def _least_bytes(model: ModelConfig) -> float:
    """What the base takes at least, by the size of its files; 0 where they are not in a folder."""
    folder = Path(model_path(model))
    stored = sum(file.stat().st_size for file in folder.glob("*.safetensors")) if folder.is_dir() else 0
    return stored / 4 * _BYTES[model.weights]


def _fit_bytes(learner: TorchLearner, examples: tuple[Encoded, ...]) -> int:
    settings = replace(learner.settings, batch_size=len(examples))
    return fit_memory_bytes(replace(learner, examples=examples, settings=settings))


def _too_much(found: str, limits: LimitsConfig) -> PacketError:
    return PacketError(
        sentence(
            "memory to train on this node",
            expected=f"at most {limits.memory_gigabytes:g} GB, its limits.memory_gigabytes",
            found=found,
            remedy="lower limits.batch_size or hold the base in fewer bits on the node, or take a smaller base",
        )
    )
