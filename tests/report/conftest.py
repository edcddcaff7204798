"""A small run, told by hand: what a journal of any shape would hold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fedpeft import journal

LABELS = ["negative", "neutral", "positive"]
GROUPS = ["films", "microblog", "newspaper", "shops"]
GAIN = {"films": 0.06, "microblog": 0.0, "newspaper": -0.09, "shops": 0.03}


@dataclass(frozen=True)
class Shape:
    """What the journal of a made-up run holds."""

    rounds: int = 10
    sites: int = 12
    cohort: int = 6
    grouped: bool = True
    mixed: bool = False
    evaluated: bool = True
    bounds: bool = True
    ended: bool = True
    failures: bool = True
    merges: bool = False


def evaluation(accuracy: float, shape: Shape) -> dict[str, Any]:
    scores = {"loss": 1.4 - accuracy, "accuracy": accuracy, "macro_f1": accuracy - 0.02, "rows": 1200}
    groups = {name: {**scores, "accuracy": accuracy + gain, "rows": 300} for name, gain in GAIN.items()}
    return {**scores, "groups": groups if shape.grouped else {}}


def partition(number: int, shape: Shape) -> dict[str, Any]:
    rows = 260 + 35 * (number * 7 % 5)
    skew = [[5, 1, 4], [1, 2, 5], [2, 7, 1], [4, 1, 4]][number % 4]
    counts = {name: rows * share // sum(skew) for name, share in zip(LABELS, skew, strict=True)}
    counts["neutral"] += rows - sum(counts.values())
    groups = {GROUPS[number % 4]: rows}
    if shape.mixed:
        groups = {GROUPS[number % 4]: rows // 2, GROUPS[(number + 1) % 4]: rows - rows // 2}
    return {"partition": number, "rows": rows, "labels": counts, "groups": groups if shape.grouped else {}}


def start_line(shape: Shape) -> dict[str, Any]:
    merging = {"adapter.lora.rank": 8, "aggregation.merge.rule": "fedex", "aggregation.optimizer.kind": "sgd"}
    return {
        "event": "start",
        "fedpeft": "0.1.0",
        "time": "2026-03-01T09:30:00Z",
        "engine": "local",
        "config": {
            "name": "demo",
            "seed": 7,
            "rounds": shape.rounds,
            "adapter.family": "lora",
            "federation.cohort": 6,
            **(merging if shape.merges else {}),
        },
        "labels": LABELS,
        "adapter": {
            "family": "lora",
            "trainable_parameters": 148_227,
            "bytes": 592_908,
            "base_parameters": 22_713_216,
            "base_bytes": 90_852_864,
        },
        "data": {"rows": 4900, "repeats_removed": 214, "train_rows": 3700, "test_rows": 1200, "test_overlap": 0.0},
        "partitions": [partition(number, shape) for number in range(shape.sites)],
    }


def client_line(number: int, site: int) -> dict[str, Any]:
    norm = 1.6 / (1 + 0.25 * number) * (1 + 0.08 * (site % 5))
    return {
        "partition": site,
        "examples": 300,
        "tokens": 9000,
        "loss": 1.1 / (1 + 0.1 * number),
        "update_norm": norm,
        "bytes_up": 593_400,
        "bytes_down": 593_700,
        "seconds": 1.2,
    }


def merge_figures(number: int) -> dict[str, Any]:
    """What a round says of its merge; a module that no site moved has no figures."""
    return {
        "merge_error": 0.2 / number,
        "merge_errors": {"layer.0.query": 0.1 / number, "layer.0.value": 0.3 / number, "layer.1.query": None},
        "effective_ranks": {"layer.0.query": 1.5, "layer.0.value": 3.5, "layer.1.query": None},
        "tail": 0.08,
        "tails": {"layer.0.query": 0.02, "layer.0.value": 0.11, "layer.1.query": None},
        "residual_rank": 6.0 * number,
        "residual_dropped": 0.0,
    }


def round_line(number: int, shape: Shape) -> dict[str, Any]:
    cohort = sorted({(number * 5 + 7 * step) % shape.sites for step in range(shape.cohort)})
    failed = cohort[1:2] if shape.failures and number in (3, 6) else []
    clients = [client_line(number, site) for site in cohort if site not in failed]
    if shape.merges:
        clients = [{**client, "rank": (2, 4, 8)[client["partition"] % 3]} for client in clients]
    accuracy = 0.73 - 0.28 / (1 + number) + 0.008 * (-1) ** number
    return {
        "event": "round",
        "round": number,
        "cohort": cohort,
        "clients": clients,
        "failures": [{"partition": site, "reason": "no answer within 600 s"} for site in failed],
        "loss": 1.1 / (1 + 0.1 * number),
        "update_norm": 0.9 / (1 + 0.3 * number),
        "drift": 0.8 + 0.06 * number,
        "learning_rate": 0.001,
        "bytes_up": sum(client["bytes_up"] for client in clients),
        "bytes_down": len(cohort) * 593_700,
        "seconds": {"total": 9.4, "exchange": 7.9, "merge": 0.1, "evaluate": 1.4},
        "evaluation": evaluation(accuracy, shape) if shape.evaluated else None,
        "client_evaluation": None,
        **(merge_figures(number) if shape.merges else {}),
    }


def bounds_line(shape: Shape) -> dict[str, Any]:
    named = [("frozen model, trained head", 0.602, {}), ("sites alone (mean of 12)", 0.587, {"spread": 0.041})]
    named.append(("pooled data", 0.741, {}))
    rows = [
        {"name": name, "evaluation": evaluation(share, shape), "seconds": 61.0, **more} for name, share, more in named
    ]
    return {"event": "bounds", "rows": rows}


def end_line(rounds: list[dict[str, Any]], shape: Shape) -> dict[str, Any]:
    return {
        "event": "end",
        "rounds": len(rounds),
        "seconds": 102.5,
        "stopped": "completed",
        "evaluation": evaluation(0.7125, shape) if shape.evaluated else None,
        "bytes_up": sum(record["bytes_up"] for record in rounds),
        "bytes_down": sum(record["bytes_down"] for record in rounds),
        "full_model_bytes": 2 * 90_852_864 * shape.cohort * len(rounds),
    }


def told(shape: Shape) -> list[dict[str, Any]]:
    """The records of a run of that shape."""
    rounds = [round_line(number, shape) for number in range(1, shape.rounds + 1)]
    bounds = [bounds_line(shape)] if shape.bounds else []
    return [start_line(shape), *rounds, *bounds, *([end_line(rounds, shape)] if shape.ended else [])]


SHAPES = {
    "whole": Shape(),
    "only the start line": Shape(rounds=0, bounds=False, ended=False),
    "one round": Shape(rounds=1, ended=False, bounds=False),
    "one site": Shape(sites=1, cohort=1, failures=False),
    "no groups": Shape(grouped=False),
    "mixed groups": Shape(mixed=True),
    "no bounds": Shape(bounds=False),
    "no evaluation": Shape(evaluated=False, bounds=False),
    "many sites": Shape(sites=150, cohort=40, rounds=120),
    "merges": Shape(merges=True),
    "merges of one round": Shape(merges=True, rounds=1, ended=False, bounds=False),
    "merges of many sites": Shape(merges=True, sites=150, cohort=40, rounds=60),
}


@pytest.fixture(scope="session")
def tell() -> Callable[..., list[dict[str, Any]]]:
    """`tell(rounds=3, bounds=False)` gives the records of a run of that shape."""
    return lambda **shape: told(Shape(**shape))


@pytest.fixture
def records() -> list[dict[str, Any]]:
    """A run that ended, with groups, bounds and failures."""
    return told(Shape())


@pytest.fixture(params=SHAPES.values(), ids=SHAPES)
def any_records(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """Runs of every shape that a journal can have."""
    return told(request.param)


@pytest.fixture
def run_folder(tmp_path: Path, records: list[dict[str, Any]]) -> Path:
    """A run folder that holds nothing but its journal."""
    return kept(tmp_path / "demo", records)


@pytest.fixture
def merged_folder(tmp_path: Path) -> Path:
    """The folder of a run whose sites have unlike ranks and whose journal measures the merges."""
    return kept(tmp_path / "merged", told(Shape(merges=True)))


def kept(folder: Path, records: list[dict[str, Any]]) -> Path:
    for record in records:
        journal.append(folder / "journal.jsonl", record)
    return folder
