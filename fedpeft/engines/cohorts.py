"""Clients of the in-process engine that train together, and the record of whether they do."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fedpeft.adapters import AdapterState
from fedpeft.client import FitJob, Fitted, InPlace, Learner
from fedpeft.cohort import Member, fit_cohort, together, unserved
from fedpeft.cohort_choice import ALONE, CHOICES
from fedpeft.cohort_layers import WAYS
from fedpeft.config.run import ComputeConfig
from fedpeft.errors import CheckpointError, FedPeftError, sentence
from fedpeft.files import write_atomically
from fedpeft.training import TorchLearner

MOST_CLIENTS = 16
"""At most so many clients train together: each has an adapter, its gradient and the optimiser's moments in memory."""

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trained:
    """What a client's training came to, or why it failed, and its share of the cohort's seconds."""

    outcome: Fitted | FedPeftError
    seconds: float


@dataclass(frozen=True)
class Asked:
    """A client that is asked to train: its partition, its learner, and what its request asks of it."""

    partition: int
    learner: Learner
    adapter: AdapterState
    job: FitJob


@dataclass(frozen=True)
class Cohorts:
    """Trains clients together as `settings` say; whether it does is chosen on the first cohort and kept in `record`."""

    settings: ComputeConfig
    record: Path
    said: list[str] = field(default_factory=list)

    def train(self, asked: Sequence[Asked]) -> dict[int, Trained]:
        """What the training of those clients comes to that train together, by partition; the others are to train alone.

        Raises:
            CheckpointError: the record of the choice cannot be written or read.
        """
        members = {
            one.partition: Member(one.learner, one.adapter, one.job)
            for one in asked
            if isinstance(one.learner, TorchLearner) and self._serves(one.learner)
        }
        groups: list[list[int]] = []
        for partition, member in members.items():
            fitting = (group for group in groups if together(members[group[0]], member))
            group = next(fitting, None)
            if group is None:
                groups.append([partition])
            else:
                group.append(partition)
        found: dict[int, Trained] = {}
        for group in (group for group in groups if len(group) > 1):
            found |= self._train([members[partition] for partition in group], group)
        return found

    def _train(self, members: Sequence[Member], partitions: Sequence[int]) -> dict[int, Trained]:
        choice = self._choice(members)
        if choice == ALONE:
            return {}
        started = time.perf_counter()
        outcomes = fit_cohort(members, self.settings.cohort_tokens, WAYS[choice])
        seconds = (time.perf_counter() - started) / len(members)
        return {p: Trained(outcome, seconds) for p, outcome in zip(partitions, outcomes, strict=True)}

    def _serves(self, learner: TorchLearner) -> bool:
        reason = unserved(learner)
        if reason and reason not in self.said:
            self.said.append(reason)
            _logger.warning("clients train one by one, not together: %s", reason)
        return not reason

    def _choice(self, members: Sequence[Member]) -> str:
        """The choice of this run: as recorded, or made now and recorded."""
        if self.record.exists():
            return self._recorded()
        choice = CHOICES[self.settings.cohort](members, self.settings.cohort_tokens)
        try:
            write_atomically(self.record, json.dumps({"cohort": choice}).encode())
        except OSError as error:
            place, remedy = str(self.record), "free disk space"
            raise CheckpointError(
                sentence(place, expected="room to write it", found=str(error), remedy=remedy)
            ) from error
        return choice

    def _recorded(self) -> str:
        try:
            choice = json.loads(self.record.read_bytes())["cohort"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            choice = type(error).__name__
        if choice not in (ALONE, *WAYS):
            known = ", ".join((ALONE, *WAYS))
            remedy = "restore the file, or delete it to choose anew"
            raise CheckpointError(sentence(str(self.record), expected=f"one of {known}", found=choice, remedy=remedy))
        return str(choice)


class _Noted(FedPeftError):
    """A request has been read as far as training."""


@dataclass(frozen=True)
class Noting(InPlace):
    """Stands for a learner, and notes what a request asks of it."""

    asked: list[tuple[AdapterState, FitJob]]

    def fit(self, adapter: AdapterState, job: FitJob) -> Fitted:
        """Nothing is trained."""
        self.asked.append((adapter, job))
        raise _Noted("noted")


@dataclass(frozen=True)
class Done(InPlace):
    """Stands for a learner that has been trained with others."""

    trained: Trained

    def fit(self, adapter: AdapterState, job: FitJob) -> Fitted:
        """What training came to.

        Raises:
            FedPeftError: it failed.
        """
        del adapter, job
        if isinstance(self.trained.outcome, FedPeftError):
            raise self.trained.outcome
        return self.trained.outcome


def some_at_once(partitions: Sequence[int]) -> Iterator[Sequence[int]]:
    """The partitions in order, `MOST_CLIENTS` at a time."""
    for start in range(0, len(partitions), MOST_CLIENTS):
        yield partitions[start : start + MOST_CLIENTS]


def cohorts_of(settings: ComputeConfig, record: Path) -> Cohorts | None:
    """How clients train together under `settings`; None where they do not."""
    return Cohorts(settings, record) if settings.cohort in CHOICES else None
