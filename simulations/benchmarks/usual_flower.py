"""A federation as Flower's own examples write one: each message loads the model, trains, and sends float32 back.

    python -m simulations.benchmarks.usual_flower SETTINGS.toml

Model, LoRA, rows and local steps are those of the settings; server, strategy, messages and Ray are Flower's. Rows are
tokenised once in each process, which is more than such examples do. Prints when each round was over, as JSON: seconds
since the process began.
"""

from __future__ import annotations

import functools
import json
import sys
import time
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation

from fedpeft.bases import load_tokenizer, model_path
from fedpeft.config import RunConfig, load
from fedpeft.experiment import resolve
from simulations.benchmarks.overhead import bare_fit

CPUS = 2
"""Cores that Ray is told of; each of so many clients at a time has one."""

app = ClientApp()


@functools.cache
def _config(settings: str) -> RunConfig:
    return resolve(load(Path(settings), []))


@functools.cache
def _pad(settings: str) -> int:
    return int(load_tokenizer(_config(settings).model).pad_token_id)


def new_model(config: RunConfig) -> torch.nn.Module:
    """The base from disk, with a fresh LoRA."""
    chosen = config.task.chosen.head
    base = getattr(transformers, chosen.auto).from_pretrained(model_path(config.model), num_labels=len(chosen.labels))
    arguments = {**config.adapter.chosen.build().peft, "task_type": chosen.task_type}
    return peft.get_peft_model(base, peft.get_peft_config(arguments))


@app.train()
def train(message: Message, context: Context) -> Message:
    """One client's round."""
    settings = str(message.content["config"]["settings"])
    config = _config(settings)
    torch.set_num_threads(1)
    model = new_model(config)
    peft.set_peft_model_state_dict(model, message.content["arrays"].to_torch_state_dict())  # type: ignore[union-attr]
    seen = bare_fit(config, model, _pad(settings), int(context.node_config["partition-id"]))
    arrays = ArrayRecord(peft.get_peft_model_state_dict(model))
    answer = RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": seen})})
    return Message(content=answer, reply_to=message)


def main(settings: str) -> None:
    """Runs the federation and prints when its rounds were over."""
    started, config, over = time.perf_counter(), _config(settings), []
    server, trained = ServerApp(), list[float]()

    def settled(round_: int, arrays: ArrayRecord) -> MetricRecord:  # noqa: ARG001
        over.append(time.perf_counter() - started)
        return MetricRecord({})

    @server.main()
    def serve(grid: Grid, context: Context) -> None:  # noqa: ARG001
        share = config.federation.cohort / config.federation.clients
        strategy = FedAvg(fraction_train=share, fraction_evaluate=0.0, min_available_nodes=config.federation.clients)
        start = ArrayRecord(peft.get_peft_model_state_dict(new_model(config)))
        told = ConfigRecord({"settings": settings})
        result = strategy.start(grid, start, num_rounds=config.rounds, train_config=told, evaluate_fn=settled)
        trained.extend(result.train_metrics_clientapp)

    here: dict[str, Any] = {"num_cpus": CPUS, "include_dashboard": False, "log_to_driver": False}
    resources = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}, "init_args": here}
    run_simulation(server, app, config.federation.clients, backend_config=resources)
    if len(trained) < config.rounds:  # Flower goes on where every client fails
        raise SystemExit(f"{len(trained)} of {config.rounds} rounds had a client that trained")
    print(json.dumps({"rounds": over, "whole": time.perf_counter() - started}), flush=True)


if __name__ == "__main__":
    from simulations.benchmarks import usual_flower  # what is in __main__, Ray's processes cannot import

    usual_flower.main(sys.argv[1])
