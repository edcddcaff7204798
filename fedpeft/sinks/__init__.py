"""Where the figures of a run may go besides its journal: Prometheus, TensorBoard, MLflow, W&B.

A sink can neither end a run nor slow it: each works in a thread of its own behind a queue, and one that fails, hangs or
falls behind is told once in the log and switched off.
"""

from fedpeft.sinks.kinds import KINDS, remedy_of
from fedpeft.sinks.running import Sinks, opened
from fedpeft.sinks.sink import About, Kind, Sink

__all__ = ["KINDS", "About", "Kind", "Sink", "Sinks", "opened", "remedy_of"]
