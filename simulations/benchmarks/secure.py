"""What secure aggregation costs a client and the server, phase by phase.

    python -m simulations.benchmarks.secure --clients 50 --values 1000000 --dropped 5

Node keys sign, all messages are really encoded, and every phase of every client runs in this process on one thread;
clients fall silent once they have shared, which costs the server most. The figure of a client is the median over
the clients that stay.
The second table is of cohorts in which a client has ever more neighbours.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, NamedTuple, TypeVar

import numpy as np
import typer
from cryptography.hazmat.primitives.asymmetric import ec

from fedpeft.cli import script
from fedpeft.privacy.secure import client, fixed_point, messages, server
from fedpeft.privacy.secure.client_state import ClientState, Member
from fedpeft.privacy.secure.keys import pinned, signing
from fedpeft.privacy.secure.packing import size_bytes
from fedpeft.privacy.secure.policy import Policy, terms_for
from fedpeft.privacy.secure.terms import Terms

Found = TypeVar("Found")
NEIGHBOURS = (4, 8, 16, 32)
BITS, CLIP = 16, 0.05


class Cost(NamedTuple):
    """Seconds of each phase for the median client and for the server; bytes that the median client sent in each."""

    client: dict[str, float]
    server: dict[str, float]
    sent: dict[str, float]


def members_of(clients: int, policy: Policy) -> dict[int, Member]:
    """Members with new node keys, which all know of each other."""
    private = {partition: ec.generate_private_key(ec.SECP384R1()) for partition in range(clients)}
    registry = pinned({partition: key.public_key() for partition, key in private.items()})
    return {partition: Member(partition, signing(key), registry, policy) for partition, key in private.items()}


def timed(seconds: list[float], work: Callable[[], Found]) -> Found:
    """What `work` gives; how long it took is appended to `seconds`."""
    start = time.perf_counter()
    found = work()
    seconds.append(time.perf_counter() - start)
    return found


def measured(terms: Terms, members: Mapping[int, Member], values: np.ndarray, dropped: int) -> Cost:
    """The cost of one sum, in which every client has the same `values`; raises if it is not exact."""
    clients, servers = defaultdict[str, list[float]](list), defaultdict[str, list[float]](list)
    sent = defaultdict[str, list[int]](list)
    states = dict.fromkeys(members, ClientState())
    gone = set(list(members)[:dropped])
    acts: dict[str, Callable[[Member, ClientState, bytes], client.Step]] = {
        "keys": client.advertise,
        "shares": client.share,
        "input": lambda member, state, message: client.mask(member, state, message, values),
        "confirmation": client.confirm,
        "opening": client.unmask,
    }

    def replies(phase: str, outbox: Mapping[int, bytes]) -> list[tuple[int, bytes]]:
        found = []
        for partition in sorted(set(outbox) - (gone if phase not in ("keys", "shares") else set())):
            act = functools.partial(acts[phase], members[partition], states[partition], outbox[partition])
            states[partition], answer = timed(clients[phase], act)
            sent[phase].append(len(answer))
            found.append((partition, answer))
        return found

    registry = members[0].registry
    came = replies("keys", dict.fromkeys(members, messages.invitation(terms)))
    state, outbox = timed(servers["keys"], lambda: server.gather_keys(terms, registry, set(members), came))
    for phase, gather in (
        ("shares", server.gather_shares),
        ("input", server.gather_inputs),
        ("confirmation", server.gather_confirmations),
    ):
        came = replies(phase, outbox)
        state, outbox = timed(servers[phase], functools.partial(gather, state, came))
    came = replies("opening", outbox)
    total = timed(servers["opening"], lambda: server.open_sum(state, came)).total
    if not (total == values * (len(members) - dropped)).all():
        raise SystemExit("the sum is not exact")
    return Cost(
        {phase: statistics.median(found) for phase, found in clients.items()},
        {phase: sum(found) for phase, found in servers.items()},
        {phase: statistics.median(found) for phase, found in sent.items()},
    )


def table(title: str, cost: Cost) -> Iterator[str]:
    """A line for each phase, and one for the sum."""
    yield title
    yield f"{'phase':<14}{'client s':>10}{'server s':>10}{'client sends':>16}"
    for phase in cost.client:
        yield f"{phase:<14}{cost.client[phase]:>10.4f}{cost.server[phase]:>10.3f}{cost.sent[phase]:>14,.0f} B"
    yield (
        f"{'all':<14}{sum(cost.client.values()):>10.4f}{sum(cost.server.values()):>10.3f}"
        f"{sum(cost.sent.values()):>14,.0f} B"
    )


def values_of(count: int, grid: fixed_point.Grid) -> np.ndarray:
    """An input such as an adapter's change: small numbers, clipped."""
    numbers = np.random.default_rng(0).normal(0.0, grid.clip / 5.0, count)
    return fixed_point.quantised(np.clip(numbers, -grid.clip, grid.clip), grid)


def planned(clients: int, values: int, dropped: int) -> tuple[Terms, np.ndarray]:
    """Terms for so many clients, and an input."""
    grid = fixed_point.Grid(CLIP, BITS)
    terms = terms_for(Policy(), "benchmark", 0, clients, values, grid.width(clients), dropped / clients)
    return terms, values_of(values, grid)


def main(
    clients: Annotated[int, typer.Option(min=3)] = 50,
    values: Annotated[int, typer.Option(min=1, help="How many numbers each client sends.")] = 1_000_000,
    dropped: Annotated[int, typer.Option(min=0, help="How many fall silent once they have shared.")] = 5,
    neighbours: Annotated[list[int] | None, typer.Option("--neighbours", min=2, help="Again for more.")] = None,
) -> None:
    """Print what one secure sum costs, and a client's time by its neighbours."""
    terms, numbers = planned(clients, values, dropped)
    cost = measured(terms, members_of(clients, Policy()), numbers, dropped)
    packed = size_bytes(values, terms.width)
    title = f"{clients} clients, {dropped} dropped, {values:,} values of {terms.width} bits"
    typer.echo("\n".join(table(f"{title}: degree {terms.degree}, threshold {terms.threshold}", cost)))
    typer.echo(f"input / packed integers ({packed:,} B): {cost.sent['input'] / packed:.5f}")
    typer.echo(f"\n{'neighbours':>10}{'client s':>10}{'of it the input':>17}{'per neighbour':>15}{'server s':>10}")
    for near in neighbours or NEIGHBOURS:
        terms, numbers = planned(near + 1, values, 0)
        cost = measured(terms, members_of(near + 1, Policy()), numbers, 0)
        whole = sum(cost.client.values())
        figures = f"{cost.client['input']:>17.4f}{whole / near:>15.5f}{sum(cost.server.values()):>10.3f}"
        typer.echo(f"{near:>10}{whole:>10.4f}{figures}")


if __name__ == "__main__":
    script(main)
