"""A run as its journal tells it: the records sorted by what they say, and the sums over rounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedpeft.errors import RunFolderError, sentence
from fedpeft.report.metrics import UNNAMED

Record = Mapping[str, Any]

_RANKED = ("lora", "lora_sb", "hira", "adalora")
"""The families whose rank is that of what an adapter does."""


@dataclass(frozen=True)
class History:
    """One run. `rounds` is sorted and holds a round once (the last telling); `end` is None while it is going.

    `findings` are what attacks on runs of the same settings came to.
    """

    start: Record
    rounds: tuple[Record, ...]
    bounds: tuple[Record, ...]
    end: Record | None
    findings: tuple[Record, ...] = ()

    @property
    def name(self) -> str:
        """The run's own name."""
        return str(self.config.get("name", "run"))

    @property
    def config(self) -> Record:
        """The run's settings by dotted key."""
        return self.start.get("config") or {}

    @property
    def metric(self) -> str:
        """The name of the figure that the run is told by."""
        return str(self.config.get("evaluation.metric") or UNNAMED)

    @property
    def partitions(self) -> Sequence[Record]:
        """Who holds what: one entry a site."""
        return self.start.get("partitions") or ()

    @property
    def evaluation(self) -> Record | None:
        """The final adapter's evaluation, or else the latest round's that has one."""
        final = (self.end or {}).get("evaluation")
        return final or (self.evaluated[-1]["evaluation"] if self.evaluated else None)

    @property
    def evaluated(self) -> tuple[Record, ...]:
        """The rounds after which the server evaluated."""
        return tuple(record for record in self.rounds if record.get("evaluation"))

    @property
    def groups(self) -> tuple[str, ...]:
        """Every group that any evaluation names, sorted."""
        seen = [self.evaluation, *(record["evaluation"] for record in self.evaluated)]
        seen += [row.get("evaluation") for row in self.bounds]
        return tuple(sorted({name for evaluation in seen if evaluation for name in evaluation.get("groups") or {}}))

    @property
    def bytes_up(self) -> int:
        """All that the sites have sent."""
        return self._total("bytes_up")

    @property
    def bytes_down(self) -> int:
        """All that the server has sent."""
        return self._total("bytes_down")

    @property
    def full_model_bytes(self) -> float | None:
        """What the same rounds would have cost sending the full model both ways; None where it is not known."""
        if self.end and self.end.get("full_model_bytes") is not None:
            return float(self.end["full_model_bytes"])
        each = [self.full_model_bytes_of(record) for record in self.rounds]
        return sum(size for size in each if size is not None) if self.base_bytes else None

    @property
    def base_bytes(self) -> int | None:
        """What sending the full model once would cost, where it is known."""
        return (self.start.get("adapter") or {}).get("base_bytes")

    @property
    def ratio(self) -> float | None:
        """How many times more the full model would have cost than what was sent."""
        sent, full = self.bytes_up + self.bytes_down, self.full_model_bytes
        return full / sent if full and sent else None

    @property
    def rule(self) -> str | None:
        """The name of the rule that merges updates; None where the settings do not tell it."""
        rule = self.config.get("aggregation.merge.rule")
        return None if rule is None else str(rule)

    @property
    def server_rank(self) -> int | None:
        """The rank of the server's adapter; None for a family without one."""
        family = str(self.config.get("adapter.family")).split("+")[0]
        rank = self.config.get(f"adapter.{family}.rank")
        return int(rank) if rank and family in _RANKED else None

    @property
    def budget(self) -> int | None:
        """The greatest rank that may go into the base; None where there is no bound."""
        budget = self.config.get(f"aggregation.merge.{self.rule}.budget")
        return int(budget) if budget else None

    @property
    def ranks(self) -> dict[int, tuple[int, ...]]:
        """The ranks that each site had in the rounds in which it took part; nothing for a family without rank."""
        found: dict[int, tuple[int, ...]] = {}
        for record in self.rounds:
            for client in record.get("clients") or ():
                if client.get("rank"):
                    found[client["partition"]] = (*found.get(client["partition"], ()), int(client["rank"]))
        return found

    @property
    def unlike_ranks(self) -> tuple[int, ...]:
        """The ranks of the sites in rising order, where they are not all one."""
        ranks = sorted({rank for of_site in self.ranks.values() for rank in of_site})
        return tuple(ranks) if len(ranks) > 1 else ()

    @property
    def seconds(self) -> float:
        """Wall-clock time of the run, or of its rounds so far."""
        if self.end and self.end.get("seconds") is not None:
            return float(self.end["seconds"])
        return float(sum((record.get("seconds") or {}).get("total") or 0 for record in self.rounds))

    @property
    def failures(self) -> tuple[tuple[int, Record], ...]:
        """Each failure with the round it fell in."""
        return tuple((record["round"], failure) for record in self.rounds for failure in record.get("failures") or ())

    def full_model_bytes_of(self, record: Record) -> float | None:
        """The full model to each of the round's cohort, and back from each client that answered."""
        if not self.base_bytes:
            return None
        return float(self.base_bytes * (len(record.get("cohort") or ()) + len(record.get("clients") or ())))

    def _total(self, key: str) -> int:
        if self.end and self.end.get(key) is not None:
            return int(self.end[key])
        return int(sum(record.get(key) or 0 for record in self.rounds))


def history(records: Sequence[Record]) -> History:
    """The run that a journal's records tell.

    Raises:
        RunFolderError: the journal does not begin with a start line.
    """
    if not records or records[0]["event"] != "start":
        raise RunFolderError(
            sentence(
                "journal.jsonl, line 1",
                expected='the "start" line of a run',
                found=f'"{records[0]["event"]}"' if records else "an empty journal",
                remedy="run it again, or restore the file from a copy",
            )
        )
    by_round = {record["round"]: record for record in records if record["event"] == "round"}
    bounds = [record["rows"] for record in records if record["event"] == "bounds"]
    ends = [record for record in records if record["event"] == "end"]
    return History(
        start=records[0],
        rounds=tuple(by_round[number] for number in sorted(by_round)),
        bounds=tuple(bounds[-1]) if bounds else (),
        end=ends[-1] if ends else None,
        findings=tuple(record for record in records if record["event"] == "finding"),
    )
