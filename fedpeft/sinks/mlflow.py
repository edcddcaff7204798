"""The figures of a run in MLflow's file store, without a server."""

from __future__ import annotations

from pathlib import Path

import mlflow
from mlflow.entities import Metric, Param
from mlflow.tracking import MlflowClient

from fedpeft.config.observation import Mlflow
from fedpeft.sinks.figures import figures_of
from fedpeft.sinks.sink import About, Record, Sink

_TAG = "fedpeft.run"
_STATES = {"completed": "FINISHED", "early": "FINISHED", "budget": "FINISHED", "failed": "FAILED"}
_MOST_PARAMS, _MOST_METRICS = 100, 500


def open_mlflow(settings: Mlflow, about: About) -> Sink:
    """A sink whose step is the round; a run that is resumed goes on in the MLflow run that it began.

    Raises:
        OSError: the folder cannot be written.
        MlflowException: the store cannot be used.
    """
    folder = Path(settings.folder) if settings.folder else about.root / "mlflow"
    client = MlflowClient(tracking_uri=folder.absolute().as_uri())
    run = _run_id(client, settings.experiment, about)
    client.update_run(run, status="RUNNING")
    steps = [metric.step for metric in client.get_metric_history(run, "updates")]

    def settled(record: Record) -> None:
        metrics = [Metric(name, value, _now(), record["round"]) for name, value in figures_of(record).items()]
        metrics.sort(key=lambda metric: metric.key == "updates")
        for first in range(0, len(metrics), _MOST_METRICS):
            client.log_batch(run, metrics=metrics[first : first + _MOST_METRICS])

    def end(how: str) -> None:
        client.set_terminated(run, _STATES.get(how, "FAILED"))

    return Sink(max(steps, default=0), settled, end)


def _run_id(client: MlflowClient, experiment: str, about: About) -> str:
    """The id of this run's run in MLflow, which is made, with the settings, where there is none yet."""
    known = client.get_experiment_by_name(experiment)
    place = known.experiment_id if known else client.create_experiment(experiment)
    found = client.search_runs([place], f"tags.`{_TAG}` = '{about.run}'")
    if found:
        return str(found[0].info.run_id)
    run = str(client.create_run(place, tags={_TAG: about.run}, run_name=about.name).info.run_id)
    params = [Param(key, str(value)[:500]) for key, value in about.start["config"].items()]
    for first in range(0, len(params), _MOST_PARAMS):
        client.log_batch(run, params=params[first : first + _MOST_PARAMS])
    return run


def _now() -> int:
    return int(mlflow.utils.time.get_current_time_millis())
