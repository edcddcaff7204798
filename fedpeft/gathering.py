"""The usable updates of one round: who is asked, at which rank, how often, and what came back."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from fedpeft.adapters import at_rank, greatest_rank
from fedpeft.errors import FedPeftError, PacketError, sentence
from fedpeft.quarantine import FAILED, REFUSED
from fedpeft.randomness import rng
from fedpeft.ranks import RankRule, said_in
from fedpeft.requests import describe_request, fit_request
from fedpeft.seen import Record, Seen
from fedpeft.strategy import Strategy
from fedpeft.updates import ServerState, Update
from fedpeft.wire import (
    PHASE,
    PHASES,
    Failure,
    Packet,
    Session,
    Transport,
    read_update,
    require_examples,
    require_manifest,
    require_norm,
)

LATE_SHARE = 2**-0.5
"""What an update of the round before weighs: (1 + staleness) to the power of −1/2, as in FedBuff.

Source: Nguyen et al. 2022, "Federated Learning with Buffered Asynchronous Aggregation", section 5 and appendix.
"""

_MOST_CHARACTERS = 500
_PAUSE_SECONDS = 0.5
_NO_ANSWER = "no answer within the deadline"

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Asking:
    """Who is asked in a round, and for how long.

    `cohort` of the `clients` (0: of those that can be reached) are asked, and `spare` more; the round takes the first
    `cohort` usable answers. Where fewer than `quorum` (0: the cohort) are usable after `deadline_seconds`, those that
    have not answered are asked again, up to `retries` times. A round begins once all whom it would ask are connected,
    or after `wait_seconds`; with fewer than the quorum it goes on waiting, for `deadline_seconds` at most. What comes
    after a round is over is passed over, or with `carry` taken into the next, where it weighs `LATE_SHARE`. An update
    longer than `most_norm`, or of more than `most_examples`, is refused (0: no bound).
    """

    cohort: int
    quorum: int
    deadline_seconds: float
    ranks: RankRule
    clients: int = 0
    spare: int = 0
    retries: int = 0
    wait_seconds: float = 0.0
    carry: bool = False
    most_norm: float = 0.0
    most_examples: int = 0

    @property
    def least(self) -> int:
        """The fewest usable updates that a round needs."""
        return self.quorum or self.cohort

    @property
    def streams(self) -> bool:
        """Whether updates can be folded while others are awaited, because nothing is asked twice or in vain."""
        return not (self.spare or self.retries or self.carry)


@dataclass(frozen=True)
class Round:
    """All that gathering a round needs; `heard(round, partition, usable)` is told of every reply.

    `sampled` are those that a private run has drawn for this round, and nobody stands in for them (None: the cohort is
    drawn among those who can be reached).
    """

    strategy: Strategy
    asking: Asking
    session: Session
    state: ServerState
    transport: Transport
    seen: Seen
    heard: Callable[[int, int, bool], None]
    barred: frozenset[int] = frozenset()
    sampled: tuple[int, ...] | None = None

    @property
    def wanted(self) -> int:
        """How many usable updates end the round."""
        return self.asking.cohort if self.sampled is None else len(self.sampled)

    @property
    def least(self) -> int:
        """The fewest usable updates that the round needs: of those drawn, where it was for chance to say how many."""
        return self.asking.least if self.sampled is None else min(self.asking.least, len(self.sampled))

    @property
    def number(self) -> int:
        """The round's number, from 1."""
        return self.state.round + 1


def updates_of(one: Round) -> Iterator[Update]:
    """The round's usable updates, in order of partition; every other reply is a failure on record.

    Floating-point sums depend on their order, so the order of arrival does not decide it.
    """
    return _streamed(one) if one.asking.streams else _held(one)


def cohort_of(state: ServerState, available: tuple[int, ...], size: int, clients: int = 0) -> tuple[int, ...]:
    """The partitions that train in the round after `state`: `size` of those available, drawn without repeats.

    All `clients` (0: those available) are put into an order by the seed and the round alone, so that one who is away
    changes nothing for the others.
    """
    known = tuple(range(clients)) if clients else available
    order = [known[i] for i in rng(state.seed, state.round + 1, "cohort").permutation(len(known))]
    there = set(available)
    return tuple(sorted([partition for partition in order if partition in there][:size]))


def in_order(
    replies: Iterable[tuple[int, Packet | Failure]], cohort: tuple[int, ...]
) -> Iterator[tuple[int, Packet | Failure]]:
    """The replies in order of partition, each as soon as all before it are in.

    A partition that never answers is a failure; one that is not in the cohort, or answers twice, is passed over.
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
        yield partition, waiting.get(partition, Failure(_NO_ANSWER))


def reason_in(text: str) -> str:
    """What a node says of itself, made fit for a journal and a terminal."""
    return "".join(letter if letter.isprintable() else " " for letter in text[:_MOST_CHARACTERS])


def _streamed(one: Round) -> Iterator[Update]:
    requests = requests_of(one, drawn_for(one, ()))
    for partition, reply in in_order(timed(one, requests), tuple(requests)):
        update = _noted(one, partition, reply)
        if update is not None:
            yield update


def _held(one: Round) -> Iterator[Update]:
    """Every update is kept until the round is closed: some may be asked for again, and some come too many."""
    asking, held = one.asking, dict(_carried(one))
    late = set(held)
    for attempt in range(1 + asking.retries):
        fresh = held.keys() - late
        if attempt and len(fresh) >= one.least:
            break
        if attempt:
            _logger.warning("round %d: %d usable updates, asking again", one.number, len(fresh))
        requests = requests_of(one, [p for p in drawn_for(one, tuple(fresh)) if p not in fresh])
        open_ = dict.fromkeys(requests)
        replies = timed(one, requests)
        for partition, reply in replies:
            if partition not in open_:
                continue
            del open_[partition]
            update = _noted(one, partition, reply)
            if update is not None:
                held[partition] = update
                if partition in late:
                    late.discard(partition)
                    one.seen.clients = [c for c in one.seen.clients if c["partition"] != partition or "late" not in c]
            if len(held.keys() - late) >= one.wanted:
                break
        replies.close()
        enough = len(held.keys() - late) >= one.wanted
        for partition in open_:
            one.seen.awaited[partition] = one.seen.ranks[partition]
            if enough:
                one.seen.surplus.append(partition)
            else:
                failed(one, partition, Failure(_NO_ANSWER))
    if len(held.keys() - late) >= one.least:
        yield from (held[partition] for partition in sorted(held))


def _carried(one: Round) -> Iterator[tuple[int, Update]]:
    """The updates of the round before that came after it was over."""
    if not one.asking.carry:
        return
    for partition, reply in sorted(one.transport.late(), key=lambda item: item[0]):
        rank = one.state.awaited.get(partition)
        if rank is None or isinstance(reply, Failure) or reply.kind == "failure" or partition in one.barred:
            continue
        update = _usable(one, partition, rank, reply, one.state.round)
        if isinstance(update, Failure):
            one.seen.hears(partition, reply)
            failed(one, partition, replace(update, reason=f"late: {update.reason}"))
        else:
            one.seen.clients.append({**client_record(partition, reply, update), "late": True})
            yield partition, replace(update, share=LATE_SHARE)


def drawn_for(one: Round, held: tuple[int, ...]) -> tuple[int, ...]:
    """The partitions to ask, once enough of them can be reached; those that are `held` count as if they could."""
    asking = one.asking
    size, started = asking.cohort + asking.spare, time.monotonic()
    everyone = tuple(p for p in range(asking.clients) if p not in one.barred)
    wished = set(one.sampled or ()) - one.barred
    if one.sampled is None and everyone:
        wished = set(cohort_of(one.state, everyone, size, asking.clients))
    while True:
        there = tuple(sorted({*one.transport.partitions(), *held} - one.barred))
        waited = time.monotonic() - started
        enough = len(there) >= one.least
        if (enough and (wished <= set(there) or waited >= asking.wait_seconds)) or not asking.clients:
            break
        if waited >= max(asking.wait_seconds, asking.deadline_seconds):
            break
        time.sleep(_PAUSE_SECONDS)
    one.seen.waited += time.monotonic() - started
    if one.sampled is not None:
        one.seen.cohort = list(one.sampled)
        return tuple(p for p in one.sampled if p in there)
    drawn = cohort_of(one.state, there, size, asking.clients)
    one.seen.cohort = sorted({*one.seen.cohort, *drawn})
    return drawn


def requests_of(one: Round, partitions: Iterable[int]) -> dict[int, Packet]:
    """A fit request for each of `partitions` that says a usable rank; what they cost is on record."""
    asked = tuple(partitions)
    ranks = _ranks(one, asked)
    one.seen.ranks |= ranks
    told = {failure["partition"] for failure in one.seen.failures}
    found = {
        p: fit_request(one.strategy, one.state, one.session, p, rank, whole=p in told) for p, rank in ranks.items()
    }
    one.seen.sends(found)
    return found


def _ranks(one: Round, cohort: tuple[int, ...]) -> dict[int, int]:
    """The rank of each partition of the cohort; one that was asked and has no usable answer is a failure on record."""
    rule = one.asking.ranks
    if not rule.asks:
        return {partition: rule.rank(partition, {}) for partition in cohort}
    found = {}
    asked = dict.fromkeys(cohort, describe_request(one.state, one.session))
    one.seen.sends(asked)
    for partition, reply in in_order(one.transport.exchange(asked, one.asking.deadline_seconds), cohort):
        one.seen.hears(partition, reply)
        failure = excuse_in(reply)
        try:
            if failure is None and isinstance(reply, Packet):
                found[partition] = _described(one, partition, reply)
        except FedPeftError as error:
            failure = Failure(str(error), REFUSED)
        if failure is not None:
            failed(one, partition, failure)
    return found


def excuse_in(reply: Packet | Failure) -> Failure | None:
    """Why there is no answer in a reply; None where there is one, usable or not."""
    if isinstance(reply, Failure):
        return reply
    if reply.kind == "failure":
        return Failure(str(reply.manifest.get("reason", "the node gave no reason")), FAILED)
    return None


def _described(one: Round, partition: int, reply: Packet) -> int:
    """The rank of a node by its description.

    Raises:
        PacketError: it is no description, or the node wants a rank above the server's.
    """
    require_manifest(reply, "description", {**one.session.manifest(one.number), "partition": partition})
    rank, cap = one.asking.ranks.rank(partition, said_in(reply)), greatest_rank(one.state.adapter.spec)
    if rank > cap:
        place = f"description of partition {partition}, rank"
        raise PacketError(sentence(place, expected=f"at most {cap}", found=rank, remedy="lower the node's rank"))
    return rank


def timed(one: Round, requests: Mapping[int, Packet]) -> Any:
    """The replies to `requests`, with the seconds spent waiting for them noted."""
    replies = iter(one.transport.exchange(requests, one.asking.deadline_seconds))
    try:
        while True:
            started = time.perf_counter()
            item = next(replies, None)
            one.seen.waited += time.perf_counter() - started
            if item is None:
                return
            yield item
    finally:
        close = getattr(replies, "close", None)
        if close:
            close()


def _noted(one: Round, partition: int, reply: Packet | Failure) -> Update | None:
    """The update in a reply, on record; None for a failure, which is on record too."""
    update = _usable(one, partition, one.seen.ranks[partition], reply, one.number)
    if isinstance(update, Failure) or isinstance(reply, Failure):
        one.seen.hears(partition, reply)
        failed(one, partition, update if isinstance(update, Failure) else Failure(""))
        return None
    one.seen.clients.append(client_record(partition, reply, update))
    one.seen.phases[partition] = _phases(update)
    one.heard(one.number, partition, True)
    return update


def failed(one: Round, partition: int, failure: Failure) -> None:
    """A failure goes on record."""
    one.seen.failures.append({"partition": partition, "kind": failure.kind, "reason": reason_in(failure.reason)})
    one.heard(one.number, partition, False)


def _usable(one: Round, partition: int, rank: int, reply: Packet | Failure, round_: int) -> Update | Failure:
    """The update that answers the request of round `round_` for `rank`, or why there is none."""
    excuse = excuse_in(reply)
    if excuse is not None or isinstance(reply, Failure):
        return excuse or Failure("")
    expected = {**one.session.manifest(round_), "partition": partition}
    try:
        update = read_update(reply, one.strategy, at_rank(one.state.adapter.spec, rank), expected)
        require_norm(update, one.asking.most_norm, f"update of partition {partition}")
        require_examples(update, one.asking.most_examples, f"update of partition {partition}")
        return update
    except FedPeftError as error:
        return Failure(str(error), REFUSED)


def client_record(partition: int, reply: Packet, update: Update) -> Record:
    """What the journal says of a client whose update counts."""
    counted = {
        "partition": partition,
        "rank": int(reply.manifest.get("rank", 0)),
        "examples": update.examples,
        "tokens": update.tokens,
        "bytes_up": reply.size_bytes,
    }
    return {"loss": math.nan, **_figures(update), **counted}


def _figures(update: Update) -> dict[str, float]:
    """What a client measured, the seconds of its phases apart."""
    return {name: value for name, value in update.metrics.items() if not name.startswith(PHASE)}


def _phases(update: Update) -> dict[str, float]:
    """The seconds of those phases that the node knows."""
    told = {phase: update.metrics.get(f"{PHASE}{phase}", -1.0) for phase in PHASES}
    return {phase: seconds for phase, seconds in told.items() if seconds >= 0.0}
