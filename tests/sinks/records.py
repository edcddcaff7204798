"""Journals of runs that never were."""

from __future__ import annotations

from typing import Any

START: dict[str, Any] = {
    "event": "start",
    "fedpeft": "0.1.0",
    "engine": "local",
    "time": "2026-01-01T00:00:00+00:00",
    "config": {"name": "demo", "rounds": 4, "federation.cohort": 2, "federation.clients": 4, "evaluation.every": 1},
    "adapter": {"family": "lora", "trainable_parameters": 1200, "base_parameters": 2_000_000, "bytes": 4800},
}


def round_record(number: int, **changes: Any) -> dict[str, Any]:
    """The record of a round in which partition 0 answered and partition 3 did not."""
    return {
        "event": "round",
        "round": number,
        "cohort": [0, 3],
        "clients": [{"partition": 0, "loss": 1 / number, "examples": 40, "seconds": 0.5, "bytes_up": 100, "rank": 8}],
        "failures": [{"partition": 3, "reason": "no answer within the deadline"}],
        "loss": 1 / number,
        "learning_rate": 0.01,
        "bytes_up": 100,
        "bytes_down": 200,
        "seconds": {"total": 2.0, "exchange": 1.5, "merge": 0.25, "evaluate": 0.25, "nodes": {"0": {"train": 0.5}}},
        "evaluation": {"accuracy": 0.5, "rows": 10, "groups": {"films & more": {"accuracy": 0.75, "rows": 4}}},
        "client_evaluation": None,
        "merge_error": 0.125,
        "drift": float("nan"),
        "merge_errors": {"query": 0.125},
        **changes,
    }


def journal_of(rounds: int) -> list[dict[str, Any]]:
    """A start and so many rounds."""
    return [START, *(round_record(number) for number in range(1, rounds + 1))]
