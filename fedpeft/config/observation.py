"""Settings of what a run tells while it goes on: its log, and the trackers that get its figures.

Nothing here changes what is learned: nodes are not told of it, and a run may be resumed with other settings of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fedpeft.config.fields import require, require_range
from fedpeft.links import parsed

LOG_FORMATS = ("text", "json")


@dataclass(frozen=True)
class Prometheus:
    """The newest figures for a Prometheus server.

    They stand in the text `file` (empty: `RUN/metrics.prom`), which node_exporter's textfile collector reads, and where
    `port` is not 0 they are also served on that port of the loopback interface.
    """

    file: str = ""
    port: int = 0

    def __post_init__(self) -> None:
        require_range(self, "port", 0, 65535)


@dataclass(frozen=True)
class TensorBoard:
    """Event files for TensorBoard in `folder` (empty: `RUN/tensorboard`)."""

    folder: str = ""


@dataclass(frozen=True)
class Mlflow:
    """A run of MLflow's file store in `folder` (empty: `RUN/mlflow`), under the name `experiment`."""

    folder: str = ""
    experiment: str = "fedpeft"

    def __post_init__(self) -> None:
        require(bool(self.experiment.strip()), "experiment", expected="a name", found=self.experiment)


@dataclass(frozen=True)
class WeightsAndBiases:
    """An offline run of W&B in `folder` (empty: `RUN/wandb`); `wandb sync` sends it later, if somebody wants it to."""

    folder: str = ""
    project: str = "fedpeft"

    def __post_init__(self) -> None:
        require(bool(self.project.strip()), "project", expected="a name", found=self.project)


SINKS: Mapping[str, type] = {
    "prometheus": Prometheus,
    "tensorboard": TensorBoard,
    "mlflow": Mlflow,
    "wandb": WeightsAndBiases,
}
"""Where the figures of a run may go, by name."""


@dataclass(frozen=True)
class ObservationConfig:
    """What a run tells: `sinks` get its figures round by round, `log_format` is the form of its log (text or json).

    `links` are those on which the report models time and energy, beside its own (`fedpeft.links`), as texts such as
    `ship = 4 1 600 50 80`: Mbit/s down and up, the round trip in ms, µJ a byte down and up.
    """

    sinks: tuple[str, ...] = ()
    links: tuple[str, ...] = ()
    log_format: str = "text"
    prometheus: Prometheus = field(default_factory=Prometheus)
    tensorboard: TensorBoard = field(default_factory=TensorBoard)
    mlflow: Mlflow = field(default_factory=Mlflow)
    wandb: WeightsAndBiases = field(default_factory=WeightsAndBiases)

    def __post_init__(self) -> None:
        for name in self.sinks:
            known = f"some of {', '.join(SINKS)}"
            require(name in SINKS, "sinks", expected=known, found=name, remedy="correct the name")
        require(len(set(self.sinks)) == len(self.sinks), "sinks", expected="each name once", found=self.sinks)
        for text in self.links:
            form = "NAME = DOWN UP ROUND_TRIP DOWN_ENERGY UP_ENERGY in Mbit/s, ms and µJ a byte"
            require(parsed(text) is not None, "links", expected=form, found=text, remedy="correct the link")
        forms = f"one of {', '.join(LOG_FORMATS)}"
        require(self.log_format in LOG_FORMATS, "log_format", expected=forms, found=self.log_format)

    def settings_of(self, sink: str) -> Any:
        """The settings of one of `sinks`."""
        return getattr(self, sink)
