"""One round, and a run of them: the same for every engine."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from fedpeft import residuals
from fedpeft.adapters import AdapterState, at_rank, greatest_rank
from fedpeft.errors import FedPeftError, PacketError, QuorumError, sentence
from fedpeft.randomness import rng
from fedpeft.ranks import RankRule, said_in
from fedpeft.requests import describe_request, evaluate_request, fit_request
from fedpeft.strategy import Measures, Strategy
from fedpeft.updates import Holding, ServerState, Update
from fedpeft.wire import (
    MOST_EXAMPLES,
    Failure,
    Packet,
    Session,
    Transport,
    read_metrics,
    read_update,
    require_manifest,
    require_norm,
)

Record = dict[str, Any]
Evaluate = Callable[[AdapterState], Record]

_MOST_CHARACTERS = 500


@dataclass(frozen=True)
class Plan:
    """What the round loop needs to know of a run's settings.

    `quorum` is the least number of usable updates. The server scores the adapter every `evaluate_every` rounds
    (0: only at the end); after `patience` scores in a row that do not better `metric` the run stops (0: never).
    `metric_sign` is 1 where more is better, -1 where less is. An update longer than `most_norm` (0: no bound) is
    refused.
    """

    session: Session
    rounds: int
    cohort: int
    quorum: int
    deadline_seconds: float
    evaluate_every: int
    evaluate_on_clients: bool
    metric: str
    metric_sign: int
    patience: int
    ranks: RankRule
    most_norm: float = 0.0


@dataclass(frozen=True)
class Observer:
    """Who is told what happens: `packet` after each reply of a round, `round` after each round is settled."""

    packet: Callable[[int, int, bool], None]
    round: Callable[[Record, ServerState], None]


@dataclass
class _Collected:
    """What the replies of one round tell the journal, gathered as they come."""

    clients: list[Record]
    failures: list[Record]


def cohort_of(state: ServerState, available: tuple[int, ...], size: int) -> tuple[int, ...]:
    """The partitions that train in the round after `state`: `size` of those available, drawn without repeats."""
    order = rng(state.seed, state.round + 1, "cohort").permutation(len(available))
    return tuple(sorted(available[i] for i in order[:size]))


def step(
    strategy: Strategy, plan: Plan, state: ServerState, transport: Transport, observer: Observer
) -> tuple[ServerState, Record]:
    """The state after one more round, and the round's journal record (less its evaluation).

    Raises:
        QuorumError: fewer usable updates than the plan's quorum came back in time.
    """
    started = time.perf_counter()
    cohort = cohort_of(state, transport.partitions(), plan.cohort)
    seen = _Collected([], [])
    ranks = _ranks(plan, state, transport, cohort, seen, observer)
    requests = {p: fit_request(strategy, state, plan.session, p, rank) for p, rank in ranks.items()}
    waited = [0.0]
    replies = _timed(transport.exchange(requests, plan.deadline_seconds), waited)
    updates = _updates(strategy, plan, state, ranks, in_order(replies, tuple(requests)), seen, observer)
    after, measures = _aggregate(strategy, plan, state, updates, seen)
    total = time.perf_counter() - started
    for client in seen.clients:
        client["bytes_down"] = requests[client["partition"]].size_bytes
    examples = sum(client["examples"] for client in seen.clients)
    record: Record = {
        "event": "round",
        "round": after.round,
        "cohort": list(cohort),
        "clients": seen.clients,
        "failures": seen.failures,
        "loss": sum(client["loss"] * client["examples"] for client in seen.clients) / examples,
        "learning_rate": seen.clients[0].get("learning_rate"),
        "bytes_up": sum(client["bytes_up"] for client in seen.clients),
        "bytes_down": sum(request.size_bytes for request in requests.values()),
        "seconds": {"total": total, "exchange": waited[0], "merge": total - waited[0], "evaluate": 0.0},
        "evaluation": None,
        "client_evaluation": None,
        **measures,
    }
    holdings = _holdings(state, seen, ranks)
    known = {after.round, *(holding.round for holding in holdings.values())}
    return replace(after, holdings=holdings, drift=residuals.forget(after.drift, known)), record


def run(
    strategy: Strategy, plan: Plan, state: ServerState, transport: Transport, evaluate: Evaluate, observer: Observer
) -> tuple[ServerState, str]:
    """The state after the last round and why it was the last: `completed` or `early`."""
    while state.round < plan.rounds:
        if _exhausted(plan, state):
            return state, "early"
        state, record = step(strategy, plan, state, transport, observer)
        started = time.perf_counter()
        if _due(plan, state.round):
            record["evaluation"] = evaluate(strategy.finalize(state))
            state = _watch(plan, state, record["evaluation"][plan.metric])
        if plan.evaluate_on_clients:
            record["client_evaluation"] = evaluate_on_clients(strategy, plan, state, transport, _took_part(record))
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
    replies = in_order(transport.exchange(requests, plan.deadline_seconds), tuple(requests))
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


def in_order(
    replies: Iterable[tuple[int, Packet | Failure]], cohort: tuple[int, ...]
) -> Iterator[tuple[int, Packet | Failure]]:
    """The replies in order of partition, each as soon as all before it are in.

    Floating-point sums depend on their order; so the order of arrival must not decide it. A partition that
    never answers is a failure; one that is not in the cohort, or answers twice, is passed over.
    """
    waiting: dict[int, Packet | Failure] = {}
    expected = list(cohort)
    for partition, reply in replies:
        waiting.setdefault(partition, reply)
        while expected and expected[0] in waiting:
            first = expected.pop(0)
            yield first, waiting[first]
            waiting[first] = Failure("answered already")
    for partition in expected:
        yield partition, waiting.get(partition, Failure("no answer within the deadline"))


def _ranks(
    plan: Plan, state: ServerState, transport: Transport, cohort: tuple[int, ...], seen: _Collected, observer: Observer
) -> dict[int, int]:
    """The rank of each partition of the cohort; one that was asked and has no usable answer is a failure on record."""
    if not plan.ranks.asks:
        return {partition: plan.ranks.rank(partition, {}) for partition in cohort}
    cap, found = greatest_rank(state.adapter.spec), {}
    asked = dict.fromkeys(cohort, describe_request(state, plan.session))
    for partition, reply in in_order(transport.exchange(asked, plan.deadline_seconds), cohort):
        try:
            found[partition] = _described(plan, state, partition, reply, cap)
        except FedPeftError as error:
            seen.failures.append({"partition": partition, "reason": _reason(str(error))})
            observer.packet(state.round + 1, partition, False)
    return found


def _described(plan: Plan, state: ServerState, partition: int, reply: Packet | Failure, cap: int) -> int:
    """The rank of a node by its description.

    Raises:
        PacketError: the node failed, or wants a rank above the server's.
    """
    if isinstance(reply, Failure):
        raise PacketError(reply.reason)
    if reply.kind == "failure":
        raise PacketError(str(reply.manifest.get("reason", "the node gave no reason")))
    require_manifest(reply, "description", {**plan.session.manifest(state.round + 1), "partition": partition})
    rank = plan.ranks.rank(partition, said_in(reply))
    if rank > cap:
        place = f"description of partition {partition}, rank"
        raise PacketError(sentence(place, expected=f"at most {cap}", found=rank, remedy="lower the node's rank"))
    return rank


def _holdings(state: ServerState, seen: _Collected, ranks: Mapping[int, int]) -> dict[int, Holding]:
    """Who is known to have what after a round: those that answered have what they were sent; nobody else is sure."""
    found = {partition: holding for partition, holding in state.holdings.items() if partition not in ranks}
    cap = greatest_rank(state.adapter.spec)
    for client in seen.clients:
        partition = client["partition"]
        rank = min(ranks[partition] or cap, cap)
        before = state.holdings.get(partition)
        found[partition] = Holding(state.round, max(rank, before.rank) if before else rank)
    return dict(sorted(found.items()))


def _took_part(record: Record) -> dict[int, int]:
    """The ranks of the clients whose updates a round used."""
    return {client["partition"]: client["rank"] for client in record["clients"]}


def _updates(
    strategy: Strategy,
    plan: Plan,
    state: ServerState,
    ranks: Mapping[int, int],
    replies: Iterable[tuple[int, Packet | Failure]],
    seen: _Collected,
    observer: Observer,
) -> Iterator[Update]:
    """The usable updates among `replies`; every other reply becomes a failure on record."""
    for partition, reply in replies:
        update = _usable(strategy, plan, state, partition, ranks[partition], reply)
        if isinstance(update, Update) and isinstance(reply, Packet):
            seen.clients.append(_client_record(partition, reply, update))
            observer.packet(state.round + 1, partition, True)
            yield update
        elif isinstance(update, Failure):
            seen.failures.append({"partition": partition, "reason": update.reason})
            observer.packet(state.round + 1, partition, False)


def _usable(
    strategy: Strategy, plan: Plan, state: ServerState, partition: int, rank: int, reply: Packet | Failure
) -> Update | Failure:
    if isinstance(reply, Failure):
        return reply
    if reply.kind == "failure":
        return Failure(_reason(str(reply.manifest.get("reason", "the node gave no reason"))))
    expected = {**plan.session.manifest(state.round + 1), "partition": partition}
    try:
        update = read_update(reply, strategy, at_rank(state.adapter.spec, rank), expected)
        require_norm(update, plan.most_norm, f"update of partition {partition}")
        return update
    except FedPeftError as error:
        return Failure(_reason(str(error)))


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


def _reason(text: str) -> str:
    """What a node says of itself, made fit for a journal and a terminal."""
    return "".join(letter if letter.isprintable() else " " for letter in text[:_MOST_CHARACTERS])


def _client_record(partition: int, reply: Packet, update: Update) -> Record:
    counted = {
        "partition": partition,
        "rank": int(reply.manifest.get("rank", 0)),
        "examples": update.examples,
        "tokens": update.tokens,
        "bytes_up": reply.size_bytes,
    }
    return {"loss": math.nan, **update.metrics, **counted}


def _aggregate(
    strategy: Strategy, plan: Plan, state: ServerState, updates: Iterator[Update], seen: _Collected
) -> tuple[ServerState, Measures]:
    """Merges `updates` while they come; the quorum is judged before anything reaches the state."""
    first = next(updates, None)
    if first is None:
        _require_quorum(plan, state, seen)
        raise QuorumError("round: expected at least one usable update, found none; check the nodes.")

    def all_updates() -> Iterator[Update]:
        yield first
        yield from updates

    after, measures = strategy.aggregate(state, all_updates())
    _require_quorum(plan, state, seen)
    return after, measures


def _require_quorum(plan: Plan, state: ServerState, seen: _Collected) -> None:
    quorum = plan.quorum or plan.cohort
    if len(seen.clients) >= quorum:
        return
    reasons = "; ".join(f"partition {item['partition']}: {item['reason']}" for item in seen.failures[:3])
    raise QuorumError(
        sentence(
            f"round {state.round + 1}",
            expected=f"at least {quorum} usable updates",
            found=f"{len(seen.clients)} ({reasons or 'no node answered'})",
            remedy="mend the nodes and run again with --resume, or lower federation.quorum",
        )
    )


def _timed(replies: Iterator[Any], waited: list[float]) -> Iterator[Any]:
    """`replies`, with the seconds spent waiting for them added to `waited[0]`."""
    while True:
        started = time.perf_counter()
        item = next(replies, None)
        waited[0] += time.perf_counter() - started
        if item is None:
            return
        yield item


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
