"""Tasks: what a model is trained to do, and how well it does it."""

from fedpeft.tasks.sequence_classification import Example
from fedpeft.tasks.task import Task, build_task, with_labels

__all__ = ["Example", "Task", "build_task", "with_labels"]
