"""What a person sees of a run, in a terminal and in a log."""

from __future__ import annotations

import io
import math
from typing import Any

import pytest
from rich.console import Console

from fedpeft.progress import watching

START: dict[str, Any] = {
    "engine": "local",
    "config": {"name": "demo", "rounds": 3, "federation.cohort": 2, "federation.clients": 4},
    "adapter": {"family": "lora", "trainable_parameters": 1200, "base_parameters": 2_000_000, "bytes": 4800},
}
ROUND: dict[str, Any] = {
    "round": 1,
    "loss": 0.5,
    "merge_error": 0.25,
    "bytes_up": 9600,
    "bytes_down": 9600,
    "evaluation": {"accuracy": 0.625},
    "failures": [{"partition": 3, "reason": "no answer within the deadline"}],
    "seconds": {"total": 2.0},
}


def shown(*, terminal: bool, quiet: bool = False, metric: str = "", **changes: Any) -> str:
    text = io.StringIO()
    console = Console(file=text, force_terminal=terminal, width=200, color_system=None)
    with watching(console, quiet=quiet) as watcher:
        watcher.start({**START, "config": {**START["config"], "evaluation.metric": metric}}, 0)
        watcher.reply(1, 0, True)
        watcher.reply(1, 3, False)
        watcher.round({**ROUND, **changes})
        watcher.bound("pooled data")
    return text.getvalue()


def test_a_log_gets_one_plain_line_for_each_thing() -> None:
    lines = shown(terminal=False).splitlines()
    assert len(lines) == 3
    assert "3 rounds, 2 of 4 sites each" in lines[0]
    for part in (
        "round   1",
        "0.500",
        "62.5 %",
        "merge error 25.0 %",
        "9.60 kB up",
        "1 failed (site 3: no answer within the deadline)",
    ):
        assert part in lines[1]
    assert lines[2] == "measuring the bound: pooled data"
    assert "\x1b" not in "".join(lines)


def test_a_terminal_gets_a_bar_of_clients_bytes_and_time_left() -> None:
    text = shown(terminal=True)
    for part in ("3 rounds, 2 of 4 sites each", "2/6", "19.2 kB moved", "left", "measuring the bound: pooled data"):
        assert part in text


@pytest.mark.parametrize(
    ("metric", "value", "said"),
    [("", 0.625, "held-out accuracy 62.5 %"), ("perplexity", 12.3456, "held-out perplexity 12.35  ")],
)
def test_a_round_tells_the_runs_own_metric(metric: str, value: float, said: str) -> None:
    found = {"accuracy": 0.625, "perplexity": 12.3456, metric or "accuracy": value}
    assert said in shown(terminal=False, metric=metric, evaluation=found)


def test_quiet_says_nothing() -> None:
    assert shown(terminal=True, quiet=True) == ""


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("unknown", [math.nan, None])
def test_an_error_that_is_not_a_number_is_not_shown(terminal: bool, unknown: float | None) -> None:
    text = shown(terminal=terminal, merge_error=unknown)
    assert "nan" not in text
    assert "merge error" not in text
    assert "62.5 %" in text


@pytest.mark.parametrize(("error", "said"), [(3e-16, "< 0.001 %"), (1.138, "113.8 %"), (0.0, "0.0 %")])
def test_an_error_is_told_as_small_as_it_is(error: float, said: str) -> None:
    assert f"merge error {said}  " in shown(terminal=False, merge_error=error)


def test_a_round_fits_into_the_widest_line_that_the_result_has() -> None:
    longest = {"round": 100, "merge_error": 3e-16, "bytes_up": 123_400_000, "bytes_down": 123_400_000, "failures": []}
    line = shown(terminal=False, **longest).splitlines()[1]
    assert len(line) <= 120
