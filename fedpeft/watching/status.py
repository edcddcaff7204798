"""What a run has come to, from its journal alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedpeft.logs import failure_kind, one_line
from fedpeft.quarantine import REFUSED

Record = Mapping[str, Any]

_RECENT = 10
_NO_SCORES = frozenset({"rows", "groups"})
_MEASURES = ("drift", "merge_error", "update_norm", "residual_rank")


@dataclass(frozen=True)
class Series:
    """A figure by round; `at` are the rounds that have it."""

    name: str
    at: tuple[int, ...]
    values: tuple[float, ...]


@dataclass(frozen=True)
class Node:
    """What one partition has done: the rounds that used its update, the last of them, and how often it failed."""

    partition: int
    updates: int
    last_round: int
    loss: float | None
    rank: int
    examples: int
    seconds: float | None
    failures: int
    quarantined: str


@dataclass(frozen=True)
class Trouble:
    """Failures of one partition of one kind: how many, the round of the last, and its words.

    `kind` is what the journal says it was (`fedpeft.quarantine`), in an older journal what its words seem to be about.
    """

    partition: int
    kind: str
    count: int
    last_round: int
    words: str


@dataclass(frozen=True)
class Status:
    """A run as its journal has it.

    `state` is `not begun`, `running`, `ended` or `failed`; `why` says how it ended. `round_seconds` is the mean of the
    last rounds and `seconds_left` what that makes of the rounds to come. `phases` are seconds of a round by phase.
    """

    name: str
    state: str
    why: str
    engine: str
    family: str
    metric: str
    round: int
    rounds: int
    resumed: int
    figures: tuple[Series, ...]
    nodes: tuple[Node, ...]
    troubles: tuple[Trouble, ...]
    clients: int
    seconds: float
    round_seconds: float | None
    seconds_left: float | None
    examples_a_second: float | None
    bytes_up: int
    bytes_down: int
    phases: Mapping[str, float]

    def series(self, name: str) -> Series | None:
        """The figure `name`, where the run has it."""
        return next((series for series in self.figures if series.name == name), None)


def status_of(records: Sequence[Record], name: str = "") -> Status:
    """The status that the records of a journal come to; `name` is for a run that has not begun."""
    start: Record = next((record for record in records if record["event"] == "start"), {})
    config: Record = start.get("config") or {}
    rounds = _rounds(records)
    recent = rounds[-_RECENT:]
    state, why = _state(records, bool(start))
    planned = int(config.get("rounds") or 0)
    mean = _mean([_seconds(record, "total") for record in recent])
    busy = sum(_seconds(record, "exchange") for record in recent)
    examples = sum(client.get("examples") or 0 for record in recent for client in record["clients"])
    done = int(rounds[-1]["round"]) if rounds else 0
    return Status(
        name=one_line(str(config.get("name") or name), 64),
        state=state,
        why=why,
        engine=str(start.get("engine", "")),
        family=str((start.get("adapter") or {}).get("family", "")),
        metric=str(config.get("evaluation.metric") or "accuracy"),
        round=done,
        rounds=planned,
        resumed=sum(record["event"] == "resume" for record in records),
        figures=tuple(_figures(rounds)),
        nodes=tuple(_nodes(rounds)),
        troubles=tuple(_troubles([*rounds, *(record for record in records if record["event"] == "missed")])),
        clients=int(config.get("federation.clients") or 0),
        seconds=sum(_seconds(record, "total") for record in rounds),
        round_seconds=mean,
        seconds_left=mean * max(0, planned - done) if mean is not None and state == "running" else None,
        examples_a_second=examples / busy if busy > 0 else None,
        bytes_up=sum(int(record.get("bytes_up") or 0) for record in rounds),
        bytes_down=sum(int(record.get("bytes_down") or 0) for record in rounds),
        phases=_phases(recent),
    )


def _rounds(records: Sequence[Record]) -> list[Record]:
    """The rounds in order, each as it was last settled; what a resumed run went back behind is not among them."""
    by_round: dict[int, Record] = {}
    for record in records:
        if record["event"] == "resume":
            by_round = {number: kept for number, kept in by_round.items() if number <= record.get("round", 0)}
        elif record["event"] == "round":
            by_round[int(record["round"])] = record
    return [by_round[number] for number in sorted(by_round)]


def _state(records: Sequence[Record], begun: bool) -> tuple[str, str]:
    if not begun:
        return "not begun", ""
    last = next((record for record in reversed(records) if record["event"] in {"end", "failed", "resume"}), None)
    if last is None or last["event"] == "resume":
        return "running", ""
    if last["event"] == "failed":
        return "failed", one_line(str(last.get("reason", "")))
    return "ended", one_line(str(last.get("stopped", "completed")), 40)


def _figures(rounds: Sequence[Record]) -> Iterator[Series]:
    """Training loss, held-out figures as a whole and by group, those of clients, and what the merge measured."""
    yield from _series("loss", [(record, record.get("loss")) for record in rounds])
    for title, key in (("held_out", "evaluation"), ("on_clients", "client_evaluation")):
        scored = [(record, record.get(key) or {}) for record in rounds]
        for name in _names(scores for _, scores in scored):
            yield from _series(f"{title}/{name}", [(record, scores.get(name)) for record, scores in scored])
        grouped = [(record, scores.get("groups") or {}) for record, scores in scored]
        for group in dict.fromkeys(group for _, groups in grouped for group in groups):
            of_group = [(record, groups.get(group) or {}) for record, groups in grouped]
            for name in _names(scores for _, scores in of_group):
                title_ = f"{title}/groups/{one_line(group, 40)}/{name}"
                yield from _series(title_, [(record, scores.get(name)) for record, scores in of_group])
    for name in _MEASURES:
        yield from _series(name, [(record, record.get(name)) for record in rounds])


def _names(scores: Iterator[Record]) -> list[str]:
    return [name for name in dict.fromkeys(name for one in scores for name in one) if name not in _NO_SCORES]


def _series(name: str, pairs: Sequence[tuple[Record, Any]]) -> Iterator[Series]:
    known = [(int(record["round"]), float(value)) for record, value in pairs if _is_number(value)]
    if known:
        yield Series(name, tuple(at for at, _ in known), tuple(value for _, value in known))


def _nodes(rounds: Sequence[Record]) -> Iterator[Node]:
    seen: dict[int, list[tuple[int, Record]]] = {}
    failed: dict[int, int] = {}
    for record in rounds:
        for client in record["clients"]:
            seen.setdefault(int(client["partition"]), []).append((int(record["round"]), client))
        for failure in record["failures"]:
            failed[int(failure["partition"])] = failed.get(int(failure["partition"]), 0) + 1
    resting = _quarantined(rounds[-1]) if rounds else {}
    for partition in sorted({*seen, *failed, *resting}):
        at, client = seen[partition][-1] if partition in seen else (0, {})
        yield Node(
            partition=partition,
            updates=len(seen.get(partition, [])),
            last_round=at,
            loss=client["loss"] if _is_number(client.get("loss")) else None,
            rank=int(client.get("rank") or 0),
            examples=sum(int(one.get("examples") or 0) for _, one in seen.get(partition, [])),
            seconds=client["seconds"] if _is_number(client.get("seconds")) else None,
            failures=failed.get(partition, 0),
            quarantined=resting.get(partition, ""),
        )


def _quarantined(record: Record) -> dict[int, str]:
    """Who is left out for now, by the last round's record: partitions with their reasons, or partitions alone."""
    found = record.get("quarantined") or {}
    pairs = found.items() if isinstance(found, Mapping) else ((partition, "") for partition in found)
    return {int(partition): one_line(str(reason), 80) or "quarantined" for partition, reason in pairs}


def _troubles(records: Sequence[Record]) -> Iterator[Trouble]:
    """Failures in rounds that were settled and that missed their quorum, and who was refused at the door in them."""
    found: dict[tuple[int, str], list[tuple[int, str]]] = {}
    for record in sorted(records, key=lambda record: int(record.get("round") or 0)):
        for failure in (*(record.get("failures") or ()), *_refused(record)):
            words = one_line(str(failure.get("reason", "")), 200)
            kind = one_line(str(failure.get("kind") or failure_kind(words)), 40)
            found.setdefault((int(failure["partition"]), kind), []).append((int(record.get("round") or 0), words))
    for (partition, kind), cases in sorted(found.items(), key=lambda item: (-len(item[1]), item[0])):
        yield Trouble(partition, kind, len(cases), cases[-1][0], cases[-1][1])


def _refused(record: Record) -> Iterator[Record]:
    """Who was not let in while a round lasted, as failures."""
    for partition, why in (record.get("refused") or {}).items():
        yield {"partition": partition, "kind": REFUSED, "reason": why}


def _phases(rounds: Sequence[Record]) -> dict[str, float]:
    """Mean seconds of a round by phase; `train` is that of the slowest node, by its own clock, inside the exchange."""
    if not rounds:
        return {}
    slowest = [max((c["seconds"] for c in r["clients"] if _is_number(c.get("seconds"))), default=0.0) for r in rounds]
    phases = {name: _mean([_seconds(record, name) for record in rounds]) for name in ("exchange", "merge", "evaluate")}
    return {"train": _mean(slowest) or 0.0, **{name: value or 0.0 for name, value in phases.items()}}


def _seconds(record: Record, phase: str) -> float:
    value: Any = record["seconds"].get(phase)
    return float(value) if _is_number(value) else 0.0


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
