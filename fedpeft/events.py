"""A run's events in its log: its start, each round, each node that failed in it, its end or failure."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from fedpeft.logs import emit, failure_kind, told

Record = Mapping[str, Any]

_logger = logging.getLogger(__name__)


def run_started(run: str, start: Record, done: int) -> None:
    """The run that `start` describes goes on after round `done`; `run` is its id."""
    config = start["config"]
    fields = {
        "name": config["name"],
        "engine": start["engine"],
        "fedpeft": start["fedpeft"],
        "rounds": config["rounds"],
        "clients": config["federation.clients"],
        "cohort": config["federation.cohort"],
        "adapter": start["adapter"]["family"],
        "done": done,
    }
    text = f"the run %s {'goes on' if done else 'begins'}: %d of %d rounds are done"
    emit(_logger, "run_started", text, config["name"], done, config["rounds"], run=run, **fields)


def round_settled(run: str, record: Record, rounds: int, metric: str) -> None:
    """A round is on record, of `rounds`; `metric` names the held-out figure that is told."""
    for failure in record["failures"]:
        node_failed(run, record["round"], failure)
    score = (record["evaluation"] or {}).get(metric)
    fields = {
        "round": record["round"],
        "loss": record["loss"],
        "updates": len(record["clients"]),
        "failures": len(record["failures"]),
        "bytes_up": record["bytes_up"],
        "bytes_down": record["bytes_down"],
        "seconds": {phase: seconds for phase, seconds in record["seconds"].items() if phase != "nodes"},
        "held_out": None if score is None else {metric: score},
    }
    text = "round %d of %d: loss %.4f, %d updates, %d failures"
    values = (record["round"], rounds, record["loss"], fields["updates"], fields["failures"])
    tail, more = ("", ()) if score is None else (", held-out %s %.4f", (metric, score))
    emit(_logger, "round", text + tail, *values, *more, run=run, **fields)


def node_failed(run: str, round_: int, failure: Record) -> None:
    """What the node of a partition did in a round could not be used; its own words are in the journal alone."""
    kind = failure_kind(str(failure["reason"]))
    values = (round_, failure["partition"], kind)
    fields = {"round": round_, "node": failure["partition"], "kind": kind}
    text = "round %d: the node of partition %d failed: %s"
    emit(_logger, "node_failed", text, *values, level=logging.WARNING, run=run, **fields)


def run_ended(run: str, end: Record) -> None:
    """The run is over, for the reason that its last record says."""
    fields = {key: end[key] for key in ("rounds", "stopped", "seconds", "bytes_up", "bytes_down")}
    text = "the run ended (%s) after %d rounds and %.1f seconds"
    emit(_logger, "run_ended", text, end["stopped"], end["rounds"], end["seconds"], run=run, **fields)


def run_failed(run: str, error: BaseException) -> None:
    """The run ends by `error`."""
    fields = {"run": run, "error": type(error).__name__}
    emit(_logger, "run_failed", "the run failed: %s", told(error), level=logging.ERROR, **fields)
