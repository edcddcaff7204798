"""What every sink gets of a round."""

from __future__ import annotations

import math

import pytest

from fedpeft.sinks.figures import figures_of, safe_name
from tests.sinks.records import round_record


def test_every_figure_of_a_round_has_its_name() -> None:
    assert figures_of(round_record(2)) == {
        "loss": 0.5,
        "learning_rate": 0.01,
        "bytes_up": 100,
        "bytes_down": 200,
        "updates": 1,
        "failures": 1,
        "failures_of/partition_3": 1,
        "seconds/total": 2.0,
        "seconds/exchange": 1.5,
        "seconds/merge": 0.25,
        "seconds/evaluate": 0.25,
        "held_out/accuracy": 0.5,
        "held_out/rows": 10,
        "held_out/groups/films_more/accuracy": 0.75,
        "held_out/groups/films_more/rows": 4,
        "merge_error": 0.125,
    }


@pytest.mark.parametrize("value", [math.nan, math.inf, None, True, "0.5", [1.0]])
def test_what_is_no_finite_number_is_no_figure(value: object) -> None:
    assert "loss" not in figures_of(round_record(1, loss=value))


def test_figures_of_clients_stand_beside_those_of_the_server() -> None:
    found = figures_of(round_record(1, client_evaluation={"accuracy": 0.25, "rows": 3, "groups": {}}))
    assert (found["on_clients/accuracy"], found["held_out/accuracy"]) == (0.25, 0.5)


@pytest.mark.parametrize("text", ["a/b\nc", "", "x" * 500, 'a"} 1\nforged{x="'])
def test_a_group_cannot_forge_a_name(text: str) -> None:
    name = safe_name(text)
    assert 0 < len(name) <= 80
    assert not set(name) & set('/\n"{}= ')


def test_no_name_is_also_a_folder_of_names() -> None:
    names = figures_of(round_record(1, client_evaluation={"accuracy": 0.25, "rows": 3, "groups": {}}))
    assert not {name for name in names if any(other.startswith(f"{name}/") for other in names)}
