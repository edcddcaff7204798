"""Tasks: what a model is trained to do, and how well it does it."""

from fedpeft.tasks.examples import IGNORED, Encoded, Example
from fedpeft.tasks.table import build_task, with_labels
from fedpeft.tasks.task import Sample, Statistics, Task

__all__ = ["IGNORED", "Encoded", "Example", "Sample", "Statistics", "Task", "build_task", "with_labels"]
