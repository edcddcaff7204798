"""The figures of a run as TensorBoard's event files."""

from __future__ import annotations

from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from fedpeft.config.observation import TensorBoard
from fedpeft.sinks.figures import figures_of
from fedpeft.sinks.sink import About, Record, Sink


def open_tensorboard(settings: TensorBoard, about: About) -> Sink:
    """A sink whose step is the round; where a run is resumed, what stands there of later rounds is taken back.

    Raises:
        OSError: the folder cannot be written.
    """
    folder = Path(settings.folder) if settings.folder else about.root / "tensorboard"
    held = min(about.held, about.done)
    writer = SummaryWriter(str(folder), purge_step=held + 1 if held else None)

    def settled(record: Record) -> None:
        for name, value in figures_of(record).items():
            writer.add_scalar(name, value, record["round"])
        writer.flush()

    def end(how: str) -> None:
        del how
        writer.close()

    return Sink(held, settled, end)
