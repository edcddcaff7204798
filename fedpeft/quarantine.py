"""A budget of failures for every node: one that keeps sending what cannot be used is not asked for a while.

Everything here is a pure function of what went on record, so a run that is resumed bars the same nodes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from fedpeft.errors import CheckpointError, sentence

ABSENT, FAILED, REFUSED = "absent", "failed", "refused"
"""The kinds of failure: no answer came, the node says itself that it failed, or its answer was not what was asked."""

WEIGHTS: Mapping[str, float] = {ABSENT: 0.0, FAILED: 0.5, REFUSED: 1.0}
"""What a failure of each kind costs: a node that is away is not at fault, one that admits a fault is half as much."""

LONGEST_REST = 2**20
"""The most rounds that a node is barred for, however often it offended."""

_MOST_CHARACTERS = 200


class Offence(NamedTuple):
    """A failure on record: of whom, of which kind, and why."""

    partition: int
    kind: str
    reason: str


@dataclass(frozen=True)
class Budget:
    """What a node may fail before it is barred.

    Once the failures of the last `window` rounds weigh `most` or more (0: nobody is ever barred), the node is not
    asked for `rest` rounds; the second time for twice as many, and so on.
    """

    most: float = 3.0
    window: int = 10
    rest: int = 20


@dataclass(frozen=True)
class Conduct:
    """How one node has behaved: `failures` as (round, weight) in the window, how often it was barred, until when.

    It is barred up to and with round `until`; `reason` is the failure that had it barred.
    """

    failures: tuple[tuple[int, float], ...] = ()
    times: int = 0
    until: int = 0
    reason: str = ""


State = Mapping[int, Conduct]
"""The conduct of those who have failed, by partition."""


def noted(budget: Budget, state: State, round_: int, offences: Iterable[Offence]) -> State:
    """`state` after round `round_`, in which `offences` went on record.

    Of several failures of one node in a round the gravest counts. A kind that is not known weighs as `ABSENT`.
    """
    if not budget.most:
        return state
    gravest: dict[int, Offence] = {}
    for offence in offences:
        before = gravest.get(offence.partition)
        if _weight(offence) > (_weight(before) if before else 0.0):
            gravest[offence.partition] = offence
    everyone = sorted({*state, *gravest})
    found = {p: _after(budget, state.get(p, Conduct()), round_, gravest.get(p)) for p in everyone}
    return {partition: conduct for partition, conduct in found.items() if conduct != Conduct()}


def quarantined(state: State, round_: int) -> dict[int, str]:
    """Who must not be asked in round `round_`, and why, one sentence each."""
    return {p: _sentence(p, conduct) for p, conduct in sorted(state.items()) if round_ <= conduct.until}


def to_fields(state: State) -> list[list[Any]]:
    """`state` as plain JSON: partition, failures, times, until and reason of each."""
    return [[p, [list(item) for item in c.failures], c.times, c.until, c.reason] for p, c in sorted(state.items())]


def from_fields(fields: Iterable[Any]) -> State:
    """The inverse of `to_fields`.

    Raises:
        CheckpointError: `fields` are not what it makes.
    """
    try:
        return {
            int(partition): Conduct(
                tuple((int(round_), float(weight)) for round_, weight in failures), int(times), int(until), str(reason)
            )
            for partition, failures, times, until, reason in fields
        }
    except (TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(
            sentence(
                "quarantine",
                expected="partition, failures, times, until and reason of each node",
                found=str(error)[:_MOST_CHARACTERS],
                remedy="resume with the version of fedpeft that wrote it",
            )
        ) from error


def _after(budget: Budget, conduct: Conduct, round_: int, offence: Offence | None) -> Conduct:
    """`conduct` a round later; a node that is barred already is not judged again for what comes late."""
    barred = round_ <= conduct.until
    kept = tuple((when, weight) for when, weight in conduct.failures if round_ - budget.window < when < round_)
    if offence is not None and not barred:
        kept = (*kept, (round_, _weight(offence)))
    if offence is None or barred or sum(weight for _, weight in kept) < budget.most:
        return Conduct(kept, conduct.times, conduct.until, conduct.reason)
    rest = min(budget.rest * 2 ** min(conduct.times, 20), LONGEST_REST)
    return Conduct((), conduct.times + 1, round_ + rest, offence.reason[:_MOST_CHARACTERS])


def _weight(offence: Offence) -> float:
    return WEIGHTS.get(offence.kind, WEIGHTS[ABSENT])


def _sentence(partition: int, conduct: Conduct) -> str:
    """Why `partition` is barred."""
    times = "for the first time" if conduct.times == 1 else f"for the {conduct.times}. time"
    return f"partition {partition} is barred {times}, up to round {conduct.until}; its last failure: {conduct.reason}"
