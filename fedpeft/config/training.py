"""Settings of the model, and of what a client does with it in a round."""

from __future__ import annotations

from dataclasses import dataclass

from fedpeft.config.fields import require, require_range


@dataclass(frozen=True)
class ModelConfig:
    """The frozen base: `asset:NAME` from the cache, a local folder, or a Hugging Face Hub name.

    `device` is `auto`, `cpu`, `cuda` or `cuda:N`; `precision` is the autocast type where there is a GPU.
    `weights` is how the frozen base is held: float32, bfloat16, or by bitsandbytes as nf4 or int8. With
    `gradient_checkpointing` layers are computed again in the backward pass; with a `device_map` (`auto`, ...) they are
    spread over devices. A node may hold the base in a way of its own: see `NODE_SETTINGS`.
    `dropout` replaces every dropout rate of the base (0 makes local training repeatable across engines).
    """

    source: str = "asset:minilm"
    revision: str = ""
    device: str = "auto"
    precision: str = "float32"
    weights: str = "float32"
    gradient_checkpointing: bool = False
    device_map: str = ""
    dropout: float = 0.0

    def __post_init__(self) -> None:
        require(bool(self.source), "source", expected="a model", found=self.source, remedy="name one")
        known = ("float32", "bfloat16", "float16")
        require(self.precision in known, "precision", expected=f"one of {', '.join(known)}", found=self.precision)
        held = ("float32", "bfloat16", "nf4", "int8")
        require(self.weights in held, "weights", expected=f"one of {', '.join(held)}", found=self.weights)
        maps = ("", "auto", "balanced", "balanced_low_0", "sequential")
        require(self.device_map in maps, "device_map", expected=f"one of {', '.join(maps[1:])}", found=self.device_map)
        device = self.device.split(":")[0]
        require(device in ("auto", "cpu", "cuda"), "device", expected="auto, cpu, cuda or cuda:N", found=self.device)
        require_range(self, "dropout", 0.0, 0.99)


NODE_SETTINGS = ("device", "precision", "weights", "gradient_checkpointing", "device_map")
"""What a node may set for itself: how it holds and computes the base, which other nodes need not share."""


@dataclass(frozen=True)
class TrainingConfig:
    """What one client does in one round: AdamW for `steps` optimiser steps.

    The learning rate warms up and then falls along a cosine over all `rounds × steps` of the run, to
    `final_fraction` of its peak. `head_learning_rate` 0 means that of the adapter. `proximal` is FedProx's μ;
    with `scaffold`, clients correct their gradients by control variates (SCAFFOLD). With `cache_gigabytes` a process
    keeps so much at most of what the layers below the lowest adapter make of examples, and computes them once.
    `compiled` is the backend of `torch.compile` that a client's steps go through (empty: none).
    """

    steps: int = 10
    batch_size: int = 16
    accumulation: int = 1
    learning_rate: float = 1e-3
    head_learning_rate: float = 0.0
    warmup_fraction: float = 0.1
    final_fraction: float = 0.1
    weight_decay: float = 0.0
    max_gradient_norm: float = 1.0
    proximal: float = 0.0
    scaffold: bool = False
    cache_gigabytes: float = 0.0
    compiled: str = ""

    def __post_init__(self) -> None:
        backends = ("", "inductor", "aot_eager")
        require(
            self.compiled in backends, "compiled", expected=f"one of {', '.join(backends[1:])}", found=self.compiled
        )
        for key in ("steps", "batch_size", "accumulation"):
            require_range(self, key, 1)
        require(self.learning_rate > 0, "learning_rate", expected="a number above 0", found=self.learning_rate)
        for key in ("head_learning_rate", "weight_decay", "max_gradient_norm", "proximal", "cache_gigabytes"):
            require_range(self, key, 0.0)
        require_range(self, "warmup_fraction", 0.0, 1.0)
        require_range(self, "final_fraction", 0.0, 1.0)


@dataclass(frozen=True)
class EvaluationConfig:
    """When held-out rows are scored, and when to stop.

    The server scores its held-out rows every `every` rounds and after the last (0: only then). With
    `on_clients`, the cohort scores the new adapter on its own rows too. `metric` is the figure that progress,
    bounds and report show (empty: the task's main one); after `patience` evaluations without a better one the run
    stops (0: never). Where a task answers in words, the report shows what the final adapter answered to `samples` rows.
    """

    every: int = 1
    batch_size: int = 64
    on_clients: bool = False
    metric: str = ""
    patience: int = 0
    samples: int = 3

    def __post_init__(self) -> None:
        require_range(self, "every", 0)
        require_range(self, "batch_size", 1)
        require_range(self, "patience", 0)
        require_range(self, "samples", 0)
        known = ("", *METRICS)
        require(self.metric in known, "metric", expected=f"one of {', '.join(METRICS)}", found=self.metric)


METRICS = {
    "accuracy": 1,
    "macro_f1": 1,
    "loss": -1,
    "perplexity": -1,
    "token_accuracy": 1,
    "entity_f1": 1,
    "exact_match": 1,
    "margin": 1,
    "reward_accuracy": 1,
}
"""Metrics that a run can show and watch, with the sign that makes larger better; a task measures some of them."""
