"""What a run sent, against what others would have sent, and what that takes on links of one's choice."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedpeft.links import Link, Transfer, joules, known, round_seconds
from fedpeft.report.history import History, Record
from fedpeft.report.tables import Table
from fedpeft.report.units import human_bytes, human_energy, short_seconds, times

OURS, DENSE, FULL = "this run", "FedAvg on the adapter in float32", "full fine-tuning in float32"
"""What is compared: the run itself, the same adapter sent whole each way, and all of the base's parameters."""

LINK_WORDS = (
    "A round takes as long as its slowest site, training apart. Energies are of unlike things, of a phone's modem on "
    "LTE, of public networks on a home line, of switches in a data centre: compare runs on one link, not links."
)
"""What must be known to read modelled figures."""

_ALIKE = 0.005
"""A difference of bytes below this share is that of manifests."""


@dataclass(frozen=True)
class Sent:
    """What one round sent: in all, to and from each site that answered, in so many exchanges one after another."""

    total: Transfer
    sites: tuple[Transfer, ...]
    exchanges: int


@dataclass(frozen=True)
class Taken:
    """What a run's bytes take on one link, by the model of `fedpeft.links`."""

    seconds: float
    joules: float


def sent_by(run: History) -> dict[str, tuple[Sent, ...]]:
    """The rounds of the run and of those it is compared with, by name; without those whose size is not known.

    The others send their parameters, 4 bytes each, to every site of the round's cohort, and have them back from
    every site that answered; nothing else.
    """
    found = {OURS: tuple(map(_ours, run.rounds))}
    for name, size in ((DENSE, _dense_bytes(run)), (FULL, run.base_bytes)):
        if size:
            found[name] = tuple(_alike(record, size) for record in run.rounds)
    return found


def total(rounds: tuple[Sent, ...]) -> Transfer:
    """All bytes of these rounds."""
    return Transfer(sum(one.total.down_bytes for one in rounds), sum(one.total.up_bytes for one in rounds))


def taken(link: Link, rounds: tuple[Sent, ...]) -> Taken:
    """What these rounds take on `link`, one after another."""
    seconds = sum(round_seconds(link, one.sites, one.exchanges) for one in rounds)
    return Taken(seconds, joules(link, total(rounds)))


def links_of(run: History) -> Mapping[str, Link]:
    """The links that the run is told on: those that every report knows, and those of its settings."""
    written = run.config.get("observation.links") or "[]"
    return known(json.loads(written) if isinstance(written, str) else written)


def summary(run: History) -> dict[str, Any]:
    """The bytes of the run and of those it is compared with, and what they take on each link, for a journal."""
    compared = sent_by(run)
    keys = {OURS: "run", DENSE: "dense", FULL: "full"}
    return {
        "bytes": {
            keys[name]: {"down": total(rounds).down_bytes, "up": total(rounds).up_bytes}
            for name, rounds in compared.items()
        },
        "links": {
            link: {keys[name]: vars(taken(line, rounds)) for name, rounds in compared.items()}
            for link, line in links_of(run).items()
        },
    }


def traffic_words(run: History) -> tuple[str, ...]:
    """What was sent, in sentences; none before the first round."""
    if not run.rounds:
        return ()
    compared = {name: total(rounds) for name, rounds in sent_by(run).items()}
    ours = compared.pop(OURS)
    less = [_against(_both(other) / _both(ours), name) for name, other in compared.items() if _both(ours)]
    said = f"Sent {human_bytes(ours.down_bytes)} down and {human_bytes(ours.up_bytes)} up"
    lines = [
        f"{name} {short_seconds(found.seconds)} and {human_energy(found.joules)}"
        for name, link in links_of(run).items()
        for found in (taken(link, tuple(map(_ours, run.rounds))),)
    ]
    scored = [record["evaluation_bytes"] for record in run.rounds if record.get("evaluation_bytes")]
    beside = sum(size["down"] for size in scored), sum(size["up"] for size in scored)
    scoring = (
        f"To score the adapter at the sites went {human_bytes(beside[0])} down and {human_bytes(beside[1])} up beside."
    )
    return (
        f"{said}{': ' if less else ''}{', '.join(less)}.",
        f"Under way, by a model of each link and not measured: {'; '.join(lines)}.",
        *_silences(run),
        *((scoring,) if scored else ()),
    )


def traffic_table(run: History) -> Table:
    """One row for the run and each of those it is compared with: bytes, and modelled time and energy on each link."""
    links, compared = links_of(run), sent_by(run)
    ours = _both(total(compared[OURS]))
    rows = []
    for name, rounds in compared.items():
        sum_, costs = total(rounds), [taken(link, rounds) for link in links.values()]
        on_links = [f"{short_seconds(cost.seconds)}, {human_energy(cost.joules)}" for cost in costs]
        ratio = times(_both(sum_) / ours) if ours else times(None)
        rows.append((name, human_bytes(sum_.down_bytes), human_bytes(sum_.up_bytes), ratio, *on_links))
    return Table(("", "bytes down", "bytes up", "× this run", *(f"on {name}" for name in links)), tuple(rows))


def rounds_table(run: History) -> Table:
    """One row a round: its bytes each way, those so far, those of the others so far, modelled time and energy."""
    links, compared = links_of(run), sent_by(run)
    others = {name: list(itertools.accumulate(_both(one.total) for one in compared[name])) for name in compared}
    down = itertools.accumulate(one.total.down_bytes for one in compared[OURS])
    up = itertools.accumulate(one.total.up_bytes for one in compared[OURS])
    rows = []
    for index, (record, one, so_far_down, so_far_up) in enumerate(
        zip(run.rounds, compared[OURS], down, up, strict=True)
    ):
        costs = [taken(link, (one,)) for link in links.values()]
        rows.append(
            (
                str(record["round"]),
                human_bytes(one.total.down_bytes),
                human_bytes(one.total.up_bytes),
                human_bytes(so_far_down),
                human_bytes(so_far_up),
                *(human_bytes(others[name][index]) for name in others if name != OURS),
                *(f"{short_seconds(cost.seconds)}, {human_energy(cost.joules)}" for cost in costs),
            )
        )
    heads = ("round", "down", "up", "down so far", "up so far", *(f"{name}, so far" for name in others if name != OURS))
    return Table((*heads, *(f"on {name}" for name in links)), tuple(rows))


def _ours(record: Record) -> Sent:
    sites = tuple(
        Transfer(client.get("bytes_down") or 0, client.get("bytes_up") or 0) for client in record.get("clients") or ()
    )
    whole = Transfer(record.get("bytes_down") or 0, record.get("bytes_up") or 0)
    return Sent(whole, sites, int(record.get("exchanges") or 1))


def _alike(record: Record, size: int) -> Sent:
    answered = len(record.get("clients") or ())
    whole = Transfer(size * len(record.get("cohort") or ()), size * answered)
    return Sent(whole, (Transfer(size, size),) * answered, 1)


def _dense_bytes(run: History) -> int | None:
    """The adapter's size in float32, frozen tensors of it included: what plain FedAvg sends of it."""
    adapter = run.start.get("adapter") or {}
    size = adapter.get("dense_bytes") or adapter.get("bytes")
    return int(size) if size else None


def _against(ratio: float, name: str) -> str:
    """How much less was sent than by another, of whose bytes ours are one part in `ratio`."""
    if abs(ratio - 1) < _ALIKE:
        return f"as much as {name}"
    return f"{times(ratio)} less than {name}" if ratio > 1 else f"{times(1 / ratio)} more than {name}"


def _silences(run: History) -> tuple[str, ...]:
    """How often a site had nothing to say, where one did."""
    answers = [client for record in run.rounds for client in record.get("clients") or ()]
    silent = sum(bool(client.get("silent")) for client in answers)
    return (f"Of {len(answers)} answers {silent} said nothing, because there was too little to say.",) if silent else ()


def _both(transfer: Transfer) -> float:
    return transfer.down_bytes + transfer.up_bytes
