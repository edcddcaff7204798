"""Each sink through its own library: what stands there after a run, after a resumed one, and after an accident."""

from __future__ import annotations

import importlib
import importlib.util
import socket
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import prometheus_client.parser
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fedpeft.sinks import KINDS, Sinks
from tests.sinks.records import journal_of, round_record

Told = Callable[[], list[str]]
Observe = Callable[..., Sinks]


def carried_out(sinks: Sinks, done: int, last: int, how: str = "completed") -> None:
    sinks.begin(journal_of(done), done)
    for number in range(done + 1, last + 1):
        sinks.round(round_record(number))
    sinks.end(how)
    sinks.wait(60)


def steps(folder: Path, name: str = "loss") -> list[tuple[int, float]]:
    found = EventAccumulator(str(folder)).Reload()
    return [(event.step, round(event.value, 4)) for event in found.Scalars(name)]


def samples(path: Path) -> dict[tuple[str, str], float]:
    """Every sample of a text file of Prometheus's, by its name and its labels less the run's."""
    found = {}
    for family in prometheus_client.parser.text_string_to_metric_families(path.read_text()):
        for sample in family.samples:
            labels = {key: value for key, value in sample.labels.items() if key != "run"}
            found[sample.name, ",".join(f"{key}={value}" for key, value in sorted(labels.items()))] = sample.value
    return found


def test_tensorboard_has_each_round_once_after_a_resume(observe: Observe, tmp_path: Path, warnings_told: Told) -> None:
    carried_out(observe("tensorboard"), 0, 3, "failed")
    carried_out(observe("tensorboard"), 2, 4)
    assert warnings_told() == []
    assert steps(tmp_path / "tensorboard") == [(1, 1.0), (2, 0.5), (3, 0.3333), (4, 0.25)]
    assert steps(tmp_path / "tensorboard", "held_out/groups/films_more/accuracy")[0] == (1, 0.75)


def test_tensorboard_in_another_folder_has_the_whole_run(observe: Observe, tmp_path: Path) -> None:
    carried_out(observe("tensorboard"), 0, 2)
    carried_out(observe("tensorboard", tensorboard={"folder": str(tmp_path / "other")}), 2, 3)
    assert [step for step, _ in steps(tmp_path / "other")] == [1, 2, 3]


def test_tensorboard_without_a_place_is_told(observe: Observe, tmp_path: Path, warnings_told: Told) -> None:
    (tmp_path / "file").write_text("")
    carried_out(observe("tensorboard", tensorboard={"folder": str(tmp_path / "file")}), 0, 2)
    (line,) = warnings_told()
    assert line.startswith("the sink tensorboard is switched off")


def test_prometheus_has_the_totals_of_the_whole_run(observe: Observe, tmp_path: Path, warnings_told: Told) -> None:
    carried_out(observe("prometheus"), 0, 2, "failed")
    assert samples(tmp_path / "metrics.prom")["fedpeft_failed", ""] == 1
    carried_out(observe("prometheus"), 2, 4)
    assert warnings_told() == []
    found = samples(tmp_path / "metrics.prom")
    expected = {
        ("fedpeft_round", ""): 4,
        ("fedpeft_rounds_planned", ""): 4,
        ("fedpeft_running", ""): 0,
        ("fedpeft_failed", ""): 0,
        ("fedpeft_rounds_total", ""): 4,
        ("fedpeft_updates_total", ""): 4,
        ("fedpeft_bytes_total", "direction=up"): 400,
        ("fedpeft_bytes_total", "direction=down"): 800,
        ("fedpeft_failures_total", "kind=no answer in time,partition=3"): 4,
        ("fedpeft_seconds_total", "phase=exchange"): 6,
        ("fedpeft_score", "figure=accuracy,group=,where=held_out"): 0.5,
        ("fedpeft_score", "figure=accuracy,group=films_more,where=held_out"): 0.75,
        ("fedpeft_figure", "figure=loss"): 0.25,
        ("fedpeft_figure", "figure=merge_error"): 0.125,
    }
    assert {key: found.get(key) for key in expected} == expected


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_prometheus_serves_its_page_on_the_loopback_interface_while_the_run_goes_on(
    observe: Observe, warnings_told: Told
) -> None:
    port = free_port()
    sinks = observe("prometheus", prometheus={"port": port})
    sinks.begin(journal_of(2), 2)
    page, deadline = "", time.monotonic() + 20
    while "fedpeft_round{" not in page and time.monotonic() < deadline:
        time.sleep(0.02)
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
                page = answer.read().decode()
        except OSError:
            continue
    assert 'fedpeft_running{run="demo"} 1.0' in page
    sinks.end("completed")
    sinks.wait(20)
    assert warnings_told() == []
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0


def test_a_port_that_is_taken_is_told(observe: Observe, warnings_told: Told) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        carried_out(observe("prometheus", prometheus={"port": other.getsockname()[1]}), 0, 1)
    (line,) = warnings_told()
    assert "prometheus is switched off" in line
    assert "in use" in line


@pytest.mark.parametrize("name", ["mlflow", "wandb"])
def test_a_tracker_has_the_run_where_its_library_is_and_is_told_of_where_it_is_not(
    observe: Observe, tmp_path: Path, warnings_told: Told, name: str
) -> None:
    before = threading.active_count()
    carried_out(observe(name), 0, 3, "failed")
    carried_out(observe(name), 2, 4)
    if importlib.util.find_spec(KINDS[name].library) is None:
        assert [f"pip install 'fedpeft[{KINDS[name].extra}]'" in line for line in warnings_told()] == [True, True]
        assert not (tmp_path / name).exists()
        assert threading.active_count() == before
    else:
        assert warnings_told() == []
        TRACKED[name](tmp_path / name)


def mlflow_has_four_steps(folder: Path) -> None:
    tracking = importlib.import_module("mlflow.tracking")
    client = tracking.MlflowClient(tracking_uri=folder.absolute().as_uri())
    (run,) = client.search_runs([client.get_experiment_by_name("fedpeft").experiment_id])
    steps = [(metric.step, round(metric.value, 4)) for metric in client.get_metric_history(run.info.run_id, "loss")]
    assert sorted(steps) == [(1, 1.0), (2, 0.5), (3, 0.3333), (4, 0.25)]
    assert (run.info.status, run.data.params["federation.clients"]) == ("FINISHED", "4")


def wandb_has_two_folders_of_one_run(folder: Path) -> None:
    runs = sorted(path.name for path in (folder / "wandb").glob("offline-run-*"))
    assert runs
    assert all(name.endswith("0123456789abcdef") for name in runs)
    assert all(list((folder / "wandb" / name).glob("*.wandb")) for name in runs)


TRACKED: dict[str, Callable[[Path], Any]] = {
    "mlflow": mlflow_has_four_steps,
    "wandb": wandb_has_two_folders_of_one_run,
}
