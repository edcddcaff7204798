"""Federations on frozen features: the base reads every text once, and sites train a small adapter on what it made.

A run of them takes a second, so that many can be compared. Strategy, merge, codec, wire and the server's checks are
those of every run; only the learner is another: logits = (x + B A x) Wᵀ + b on features x, the low-rank product as on
any layer and W, b as the task's own last layer, with gradients by hand and Adam.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fedpeft.adapters import AdapterSpec, AdapterState, ModuleSpec, Tensors
from fedpeft.client import FitJob, Fitted
from fedpeft.config import RunConfig
from fedpeft.data.rows import Row
from fedpeft.evaluation import padding
from fedpeft.experiment import adapted_model, task_of
from fedpeft.models import install
from fedpeft.randomness import rng

_BATCH = 128
_MOMENTS, _TINY = (0.9, 0.999), 1e-8
A, B, WEIGHT, BIAS = "hidden.A", "hidden.B", "head.weight", "head.bias"
"""The adapter's tensors."""


@dataclass(frozen=True)
class Features:
    """Rows as the base made them: `inputs` `(rows, features)`, float32, and the number of each row's label."""

    inputs: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class FeatureLearner:
    """A site that trains on features; implements `fedpeft.client.Learner`."""

    spec: AdapterSpec
    rows: Features
    steps: int
    batch_size: int
    learning_rate: float
    seed: int

    @property
    def start(self) -> AdapterState:
        """The adapter that the first round starts from."""
        return drawn_adapter(self.spec, self.seed)

    def fit(self, adapter: AdapterState, job: FitJob) -> Fitted:
        """Adam on the adapter for so many steps, from batches that are drawn anew each round."""
        tensors = {key: np.array(value) for key, value in adapter.tensors.items()}
        moments = {key: (np.zeros_like(value), np.zeros_like(value)) for key, value in tensors.items()}
        random, losses = rng(self.seed, job.partition, job.round, "batches"), []
        for step in range(1, self.steps + 1):
            drawn = random.integers(len(self.rows.labels), size=self.batch_size)
            loss, gradients = gradient(tensors, self.rows.inputs[drawn], self.rows.labels[drawn])
            losses.append(loss)
            for key in tensors.keys() - set(job.frozen):
                _adam(tensors, moments, key, gradients[key], self.learning_rate, step)
        examples = self.steps * self.batch_size
        metrics = {"loss": float(np.mean(losses)), "learning_rate": self.learning_rate}
        return Fitted(adapter.tensors, tensors, examples, examples, job.position + self.steps, metrics)

    def evaluate(self, adapter: AdapterState) -> Mapping[str, float]:
        """Accuracy and loss on this site's rows."""
        loss, _ = gradient(adapter.tensors, self.rows.inputs, self.rows.labels)
        return {**accuracy(adapter.tensors, self.rows), "loss": loss}


def spec_of(features: int, labels: int, rank: int) -> AdapterSpec:
    """The specification of the adapter on so many features."""
    hidden = ModuleSpec("hidden", "lora", rank, 1.0, (("A", (rank, features)), ("B", (features, rank))))
    head = ModuleSpec("head", "full", 0, 1.0, (("bias", (labels,)), ("weight", (labels, features))))
    return AdapterSpec("frozen features", "lora", (head, hidden))


def drawn_adapter(spec: AdapterSpec, seed: int) -> AdapterState:
    """The adapter that the first round starts from: A is drawn, all else is zero but the weight of the last layer."""
    random = rng(seed, "adapter")
    tensors = {key: np.zeros(shape, np.float32) for key, shape in spec.shapes.items()}
    for key in (A, WEIGHT):
        tensors[key] = (random.standard_normal(spec.shapes[key]) / np.sqrt(spec.shapes[key][1])).astype(np.float32)
    return AdapterState(spec, tensors)


def predicted(tensors: Tensors, inputs: np.ndarray) -> np.ndarray:
    """The label that each of the inputs is given."""
    found: np.ndarray = _logits(tensors, inputs)[1].argmax(-1)
    return found


def accuracy(tensors: Tensors, rows: Features) -> dict[str, float]:
    """The share of rows whose label is found, and how many there are."""
    return {"accuracy": float((predicted(tensors, rows.inputs) == rows.labels).mean()), "rows": len(rows.labels)}


def gradient(tensors: Tensors, inputs: np.ndarray, labels: np.ndarray) -> tuple[float, dict[str, np.ndarray]]:
    """The mean cross-entropy and its gradient by tensor."""
    hidden, logits = _logits(tensors, inputs)
    logits = logits - logits.max(-1, keepdims=True)
    logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    back = np.exp(logs)
    back[np.arange(len(labels)), labels] -= 1
    back /= len(labels)
    inside = back @ tensors[WEIGHT]
    return float(-logs[np.arange(len(labels)), labels].mean()), {
        WEIGHT: back.T @ hidden,
        BIAS: back.sum(0),
        B: inside.T @ (inputs @ tensors[A].T),
        A: (inside @ tensors[B]).T @ inputs,
    }


def _logits(tensors: Tensors, inputs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    hidden = inputs + (inputs @ tensors[A].T) @ tensors[B].T
    return hidden, hidden @ tensors[WEIGHT].T + tensors[BIAS]


def _adam(
    tensors: dict[str, np.ndarray],
    moments: dict[str, tuple[np.ndarray, np.ndarray]],
    key: str,
    slope: np.ndarray,
    rate: float,
    step: int,
) -> None:
    """One step on one tensor, in place. Source: Kingma and Ba 2015, "Adam", algorithm 1."""
    (first, second), (one, two) = moments[key], _MOMENTS
    first += (1 - one) * (slope - first)
    second += (1 - two) * (slope**2 - second)
    tensors[key] -= rate * (first / (1 - one**step)) / (np.sqrt(second / (1 - two**step)) + _TINY)


def read_texts(config: RunConfig, texts: Sequence[str]) -> np.ndarray:
    """What the base, without an adapter, makes of texts: the mean of its last layer over each one's tokens."""
    adapted, task = adapted_model(config), task_of(config)
    install(adapted, adapted.initial)
    model: Any = adapted.model.eval()
    examples = task.encode([Row(text, task.labels[0]) for text in texts], adapted.tokenizer, "texts")
    order = sorted(range(len(examples)), key=lambda at: examples[at].size)
    found = np.zeros((len(examples), model.config.hidden_size), np.float32)
    for start in range(0, len(order), _BATCH):
        at = order[start : start + _BATCH]
        batch = task.collate([examples[i] for i in at], padding(adapted), adapted.device)
        read = {key: batch[key] for key in ("input_ids", "attention_mask")}
        with torch.inference_mode():
            last = model(**read, output_hidden_states=True).hidden_states[-1].float()
        shares = read["attention_mask"][:, :, None].float()
        found[at] = ((last * shares).sum(1) / shares.sum(1)).cpu().numpy()
    return found
