"""Settings of the tasks, what each needs of a base, and the table of their names."""

from __future__ import annotations

from dataclasses import dataclass

from fedpeft.config.fields import Table, require, require_range


@dataclass(frozen=True)
class Head:
    """What a task needs of a base.

    `auto` is the class of transformers that loads the base with the task's last layer, `task_type` what peft calls
    the task (empty: nothing), `labels` the outputs of a last layer of the task's own, in order (empty: it has none).
    """

    auto: str
    task_type: str = ""
    labels: tuple[str, ...] = ()


@dataclass(frozen=True)
class SequenceClassification:
    """One label for each text; `labels` in the order of the head's outputs, empty to take them from the data."""

    labels: tuple[str, ...] = ()
    max_tokens: int = 128

    def __post_init__(self) -> None:
        require(len(set(self.labels)) == len(self.labels), "labels", expected="distinct names", found=self.labels)
        require(len(self.labels) != 1, "labels", expected="two names or more, or none", found=self.labels)
        require_range(self, "max_tokens", 8)

    @property
    def head(self) -> Head:
        """What the task needs of a base."""
        return Head("AutoModelForSequenceClassification", "SEQ_CLS", self.labels)


TASKS = Table("kind", {"sequence_classification": SequenceClassification})
