"""A federation as pfl's own LoRA benchmark writes one, in an environment that has pfl and need not have fedpeft.

    .venv-bench/bin/python -m simulations.benchmarks.usual_pfl FOLDER --threads 2

FOLDER is what `simulations.benchmarks.against_pfl` prepared: a base, the adapter that rounds begin with, and
`job.json` with the batches of every client of every round, tokenised and padded. Model, data set, backend, algorithm
and optimisers are pfl's and peft's; nothing is evaluated. With `PFL_WORKER_ADDRESSES` and `PFL_WORKER_RANK` in the
environment it is one of several processes, among which pfl divides each cohort. The first of them writes the trained
adapter to FOLDER/trained and prints JSON: when each round was over, in seconds since the process began; its mean local
loss, of the clients that this process had; versions.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import statistics
import time
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import transformers
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByDatapoints
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.sampling import MinimizeReuseUserSampler
from pfl.hyperparam.base import NNEvalHyperParams, NNTrainHyperParams
from pfl.metrics import Metrics, Summed
from pfl.model.pytorch import PyTorchModel

LIBRARIES = ("pfl", "torch", "transformers", "peft")

Batch = Mapping[str, torch.Tensor]


class Batches(Dataset):  # type: ignore[misc]
    """One client's local steps of one round: batches of a length each, `input_ids` of (batch, tokens)."""

    def __init__(self, batches: list[Batch], user_id: str) -> None:
        super().__init__((torch.cat([batch["labels"] for batch in batches]),), user_id=user_id)
        self._batches = batches

    def iter(self, batch_size: int | None) -> Iterator[Batch]:  # noqa: ARG002 - they have their sizes
        """The batches in their order."""
        return iter(self._batches)


class Clock(TrainingProcessCallback):  # type: ignore[misc]
    """When each round was over, in seconds since `started`, and the mean of the `losses` that it added."""

    def __init__(self, started: float, losses: list[torch.Tensor]) -> None:
        self.started, self.losses = started, losses
        self.over: list[float] = []
        self.mean: list[float] = []

    def after_central_iteration(
        self,
        aggregate_metrics: Metrics,  # noqa: ARG002
        model: PyTorchModel,  # noqa: ARG002
        *,
        central_iteration: int,  # noqa: ARG002
    ) -> tuple[bool, Metrics]:
        """Notes the time; training goes on."""
        self.over.append(time.perf_counter() - self.started)
        self.mean.append(statistics.fmean(loss.item() for loss in self.losses))
        self.losses.clear()
        return False, Metrics()


def new_model(job: Mapping[str, Any], folder: Path, losses: list[torch.Tensor]) -> Any:
    """The base with its adapter, and what pfl asks of a model; `losses` takes the loss of every step."""
    base = getattr(transformers, job["auto"]).from_pretrained(folder / "base")
    model = peft.PeftModel.from_pretrained(base, str(folder / "adapter"), is_trainable=True)
    model.train()

    def loss(self: torch.nn.Module, **batch: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self(**batch).loss
        losses.append(found.detach().clone())  # pfl divides it in place
        return found

    def metrics(self: torch.nn.Module, **batch: torch.Tensor) -> dict[str, Any]:  # noqa: ARG001 - nothing is scored
        return {"rows": Summed(len(batch["labels"]))}

    for name, method in (("loss", loss), ("metrics", metrics)):
        setattr(model, name, types.MethodType(method, model))
    return model


def new_optimizer(job: Mapping[str, Any], model: torch.nn.Module, lr: float) -> torch.optim.Optimizer:
    """A client's AdamW over what is trained, the head at its own rate."""
    groups: dict[bool, list[torch.nn.Parameter]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups["modules_to_save" in name].append(parameter)
    rates = {False: lr, True: job["head_learning_rate"]}
    told = [{"params": found, "lr": rates[head]} for head, found in groups.items() if found]
    return torch.optim.AdamW(told, lr=lr, weight_decay=job["weight_decay"])


def tensors(batch: Mapping[str, Any]) -> Batch:
    """A batch of lists as tensors."""
    return {name: torch.tensor(values) for name, values in batch.items()}


def main(folder: Path, threads: int) -> None:
    """Runs the federation and prints when its rounds were over."""
    started = time.perf_counter()
    torch.set_num_threads(threads)
    np.random.seed(0)  # pfl's processes agree about clients by numpy's generator
    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    visits = {f"{at}": [tensors(batch) for batch in visit["batches"]] for at, visit in enumerate(job["visits"])}
    losses: list[torch.Tensor] = []
    model = new_model(job, folder, losses)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    clock = Clock(started, losses)
    data = FederatedDataset(lambda visit: Batches(visits[visit], visit), MinimizeReuseUserSampler(list(visits)))
    wrapped = PyTorchModel(
        model=model,
        local_optimizer_create=lambda _, lr: new_optimizer(job, model, lr),
        central_optimizer=torch.optim.SGD(trained, 1.0),
    )
    FederatedAveraging().run(
        algorithm_params=NNAlgorithmParams(
            central_num_iterations=job["rounds"],
            evaluation_frequency=job["rounds"],
            train_cohort_size=job["cohort"],
            val_cohort_size=None,
        ),
        backend=SimulatedBackend(training_data=data, val_data=data, postprocessors=[WeightByDatapoints()]),
        model=wrapped,
        model_train_params=NNTrainHyperParams(
            local_num_epochs=1,
            local_learning_rate=job["learning_rate"],
            local_batch_size=job["batch_size"],
            local_max_grad_norm=job["max_gradient_norm"] or None,
        ),
        model_eval_params=NNEvalHyperParams(local_batch_size=job["batch_size"]),
        callbacks=[clock],
        send_metrics_to_platform=False,
    )
    if int(os.environ.get("PFL_WORKER_RANK", "0")) == 0:
        model.save_pretrained(str(folder / "trained"), save_embedding_layers=False)
        versions = {name: importlib.metadata.version(name) for name in LIBRARIES}
        said = {"rounds": clock.over, "losses": clock.mean, "whole": time.perf_counter() - started}
        print(json.dumps({**said, "versions": versions}), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Run a prepared federation by pfl.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    main(arguments.folder, arguments.threads)
