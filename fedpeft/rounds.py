"""One round, and a run of them: the same for every engine."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

from fedpeft import residuals
from fedpeft.adapters import AdapterState, greatest_rank
from fedpeft.errors import FedPeftError, QuorumError, sentence
from fedpeft.gathering import Asking, Round, cohort_of, in_order, updates_of
from fedpeft.quarantine import Budget, Offence, noted, quarantined
from fedpeft.requests import evaluate_request
from fedpeft.secure_rounds import summed
from fedpeft.seen import Counted, Record, Seen
from fedpeft.strategy import Measures, Strategy
from fedpeft.updates import Holding, ServerState, Spent, Update
from fedpeft.wire import MOST_EXAMPLES, Failure, Packet, Session, Transport, read_metrics, require_manifest

__all__ = ["Evaluate", "Observer", "Plan", "Record", "cohort_of", "evaluate_on_clients", "in_order", "run", "step"]

Evaluate = Callable[[AdapterState], Record]

NO_BUDGET = Budget(most=0.0)
"""Nobody is ever barred."""


@dataclass(frozen=True)
class Plan:
    """What the round loop needs to know of a run's settings.

    `asking` says who takes part in a round. The server scores the adapter every `evaluate_every` rounds (0: only at
    the end); after `patience` scores in a row that do not better `metric` the run stops (0: never). `metric_sign` is 1
    where more is better, -1 where less is. A node that fails more than its `budget` is not asked for a while. No round
    begins that is not `affordable`.
    """

    session: Session
    rounds: int
    asking: Asking
    evaluate_every: int
    evaluate_on_clients: bool
    metric: str
    metric_sign: int
    patience: int
    budget: Budget = NO_BUDGET
    affordable: Callable[[ServerState], bool] = lambda state: True  # noqa: ARG005


@dataclass(frozen=True)
class Observer:
    """Who is told what happens.

    `packet` hears of each reply of a round, `spend` of what its result costs before there is one, `round` of each
    round that is settled.
    """

    packet: Callable[[int, int, bool], None]
    round: Callable[[Record, ServerState], None]
    spend: Callable[[Spent], None] = lambda spent: None  # noqa: ARG005


def step(
    strategy: Strategy, plan: Plan, state: ServerState, transport: Transport, observer: Observer
) -> tuple[ServerState, Record]:
    """The state after one more round, and the round's journal record (less its evaluation).

    Raises:
        QuorumError: fewer usable updates than the plan's quorum came back in time.
    """
    started = time.perf_counter()
    seen = Seen()
    barred = quarantined(state.conduct, state.round + 1)
    sampled = strategy.mechanism.drawn(state) if strategy.mechanism else None
    one = Round(
        strategy, plan.asking, plan.session, state, transport, seen, observer.packet, frozenset(barred), sampled
    )
    after, measures = _aggregate(one, observer.spend)
    total = time.perf_counter() - started
    seen.clients.sort(key=lambda client: client["partition"])
    for client in seen.clients:
        client["bytes_down"] = seen.sent.get(client["partition"], 0)
        client["bytes_up"] += seen.said.pop(client["partition"], 0)
    examples = sum(client["examples"] for client in seen.clients)
    record: Record = {
        "event": "round",
        "round": after.round,
        "cohort": seen.cohort,
        "clients": seen.clients,
        "failures": seen.failures,
        "loss": sum(client["loss"] * client["examples"] for client in seen.clients) / examples
        if examples
        else math.nan,
        "learning_rate": seen.clients[0].get("learning_rate") if seen.clients else None,
        "bytes_up": sum(client["bytes_up"] for client in seen.clients) + sum(seen.said.values()),
        "bytes_down": sum(seen.sent.values()),
        "exchanges": seen.exchanges,
        "seconds": {
            **{"total": total, "exchange": seen.waited, "merge": total - seen.waited, "evaluate": 0.0},
            "nodes": {str(partition): phases for partition, phases in sorted(seen.phases.items()) if phases},
        },
        "evaluation": None,
        "client_evaluation": None,
        **({"surplus": sorted(set(seen.surplus))} if seen.surplus else {}),
        **({"quarantined": {str(partition): why for partition, why in barred.items()}} if barred else {}),
        **measures,
    }
    holdings = _holdings(state, seen)
    known = {after.round, *(holding.round for holding in holdings.values())}
    drift = residuals.forget(after.drift, known)
    offences = (Offence(failed["partition"], failed["kind"], failed["reason"]) for failed in seen.failures)
    conduct = noted(plan.budget, state.conduct, after.round, offences)
    awaited = dict(sorted(seen.awaited.items()))
    return replace(after, holdings=holdings, drift=drift, awaited=awaited, conduct=conduct), record


def run(
    strategy: Strategy, plan: Plan, state: ServerState, transport: Transport, evaluate: Evaluate, observer: Observer
) -> tuple[ServerState, str]:
    """The state after the last round and why it was the last: `completed`, `early`, or `budget` of privacy."""
    while state.round < plan.rounds:
        if _exhausted(plan, state):
            return state, "early"
        if not plan.affordable(state):
            return state, "budget"
        state, record = step(strategy, plan, state, transport, observer)
        started = time.perf_counter()
        if _due(plan, state.round):
            record["evaluation"] = evaluate(strategy.finalize(state))
            state = _watch(plan, state, record["evaluation"][plan.metric])
        if plan.evaluate_on_clients:
            counted = Counted(transport)
            record["client_evaluation"] = evaluate_on_clients(strategy, plan, state, counted, _took_part(record))
            record["evaluation_bytes"] = {"down": counted.down, "up": counted.up}
        record["seconds"]["evaluate"] = time.perf_counter() - started
        record["seconds"]["total"] += record["seconds"]["evaluate"]
        observer.round(record, state)
    return state, "completed"


def evaluate_on_clients(
    strategy: Strategy, plan: Plan, state: ServerState, transport: Transport, ranks: Mapping[int, int]
) -> Record | None:
    """The mean of the clients' own figures, each weighed by the rows of those who have it; None where none answered.

    `ranks` are those of the clients that are asked, by partition.
    """
    requests = {p: evaluate_request(strategy, state, plan.session, p, ranks[p]) for p in sorted(ranks)}
    replies = in_order(transport.exchange(requests, plan.asking.deadline_seconds), tuple(requests))
    found = [_figures(plan, state, partition, reply) for partition, reply in replies]
    answers = [figures for figures in found if figures]
    if not answers:
        return None
    means = {}
    for name in sorted({name for figures in answers for name in figures} - {"rows"}):
        having = [figures for figures in answers if name in figures]
        rows = sum(figures["rows"] for figures in having)
        means[name] = sum(figures[name] * figures["rows"] for figures in having) / rows
    return {**means, "rows": int(sum(figures["rows"] for figures in answers)), "groups": {}}


def _holdings(state: ServerState, seen: Seen) -> dict[int, Holding]:
    """Who is known to have what after a round: those that answered have what they were sent; nobody else is sure."""
    found = {partition: holding for partition, holding in state.holdings.items() if partition not in seen.ranks}
    cap = greatest_rank(state.adapter.spec)
    for client in seen.clients:
        partition = client["partition"]
        if "late" in client:
            continue
        rank = min(seen.ranks[partition] or cap, cap)
        before = state.holdings.get(partition)
        found[partition] = Holding(state.round, max(rank, before.rank) if before else rank)
    return dict(sorted(found.items()))


def _took_part(record: Record) -> dict[int, int]:
    """The ranks of the clients whose updates a round used."""
    return {client["partition"]: client["rank"] for client in record["clients"]}


def _figures(plan: Plan, state: ServerState, partition: int, reply: Packet | Failure) -> dict[str, float]:
    """What a client says of the adapter; nothing where it is not an answer, or does not say of how many rows."""
    if isinstance(reply, Failure):
        return {}
    try:
        require_manifest(reply, "evaluation", {**plan.session.manifest(state.round), "partition": partition})
        figures = read_metrics(reply, f"evaluation of partition {partition}")
    except FedPeftError:
        return {}
    rows = figures.get("rows", 0.0)
    return figures if plan.metric in figures and rows.is_integer() and 0 < rows <= MOST_EXAMPLES else {}


def _aggregate(one: Round, spend: Callable[[Spent], None]) -> tuple[ServerState, Measures]:
    """Merges the round's updates while they come; once all are in, the quorum is judged and the result paid for."""
    mechanism = one.strategy.mechanism

    def all_updates() -> Iterator[Update]:
        yield from _one_sum(one) if one.strategy.channel else updates_of(one)
        _require_quorum(one)
        spent = mechanism.charge(one.number) if mechanism else None
        if spent:
            spend(spent)

    return one.strategy.aggregate(one.state, all_updates())


def _one_sum(one: Round) -> Iterator[Update]:
    """As `summed`; where too few went through with it, the error says why they did not."""
    try:
        yield from summed(one)
    except QuorumError as error:
        expected = "enough clients in each of its exchanges"
        remedy = "do as they say, or run again with --resume once more nodes answer"
        raise _missed(one, f"secure sum of round {one.number}", expected, "too few", remedy) from error


def _require_quorum(one: Round) -> None:
    if len(one.seen.clients) >= one.least:
        return
    expected, found = f"at least {one.least} usable updates", str(len(one.seen.clients))
    remedy = "mend the nodes and run again with --resume, or lower federation.quorum"
    raise _missed(one, f"round {one.number}", expected, found, remedy)


def _missed(one: Round, place: str, expected: str, found: str, remedy: str) -> QuorumError:
    reasons = "; ".join(f"partition {item['partition']}: {item['reason']}" for item in one.seen.failures[:3])
    missed = {
        "round": one.number,
        "least": one.least,
        "cohort": one.seen.cohort,
        "usable": sorted(client["partition"] for client in one.seen.clients),
        "failures": one.seen.failures,
        "seconds": {"exchange": one.seen.waited},
    }
    told = f"{found} ({reasons or 'no node answered'})"
    return QuorumError(sentence(place, expected=expected, found=told, remedy=remedy), missed)


def _due(plan: Plan, round_: int) -> bool:
    return round_ == plan.rounds or (plan.evaluate_every > 0 and round_ % plan.evaluate_every == 0)


def _watch(plan: Plan, state: ServerState, value: float) -> ServerState:
    """The state with early stopping's memory brought up to date."""
    score = plan.metric_sign * value
    better = score > state.progress.get("best", -math.inf)
    since = 0.0 if better else state.progress.get("since", 0.0) + 1
    best = score if better else state.progress.get("best", -math.inf)
    return replace(state, progress={"best": best, "since": since})


def _exhausted(plan: Plan, state: ServerState) -> bool:
    return plan.patience > 0 and state.progress.get("since", 0.0) >= plan.patience
