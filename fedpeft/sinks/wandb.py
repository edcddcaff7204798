"""The figures of a run as an offline run of W&B: nothing is sent anywhere."""

from __future__ import annotations

from pathlib import Path

import wandb

from fedpeft.config.observation import WeightsAndBiases
from fedpeft.sinks.figures import figures_of
from fedpeft.sinks.sink import About, Record, Sink

_FAILED = 1


def open_wandb(settings: WeightsAndBiases, about: About) -> Sink:
    """A sink whose step is the round; a run that is resumed goes on under the same id in a further offline folder.

    Raises:
        OSError: the folder cannot be written.
        wandb.Error: the run could not be begun.
    """
    folder = Path(settings.folder) if settings.folder else about.root / "wandb"
    folder.mkdir(parents=True, exist_ok=True)
    held = min(about.held, about.done)
    quiet = wandb.Settings(
        mode="offline", silent=True, console="off", disable_git=True, disable_code=True, x_disable_stats=True
    )
    run = wandb.init(
        dir=str(folder),
        project=settings.project,
        id=about.run,
        name=about.name,
        config=dict(about.start["config"]),
        resume="allow" if held else None,
        settings=quiet,
    )

    def settled(record: Record) -> None:
        run.log(figures_of(record), step=record["round"])

    def end(how: str) -> None:
        run.finish(exit_code=_FAILED if how == "failed" else 0)

    return Sink(held, settled, end)
