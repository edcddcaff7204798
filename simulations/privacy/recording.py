"""A run as `fedpeft simulate` does it, with what each adversary saw of it, and apart from that what was true.

Nothing of fedpeft is changed: the transport is wrapped, and the server's states are read from its checkpoints.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fedpeft import checkpoint
from fedpeft.adapters import at_rank
from fedpeft.client import Site
from fedpeft.config import RunConfig
from fedpeft.data.rows import Row
from fedpeft.engines.local import LocalTransport
from fedpeft.errors import FedPeftError, PlanError, sentence
from fedpeft.experiment import adapted_model, site_of, strategy_of, task_of
from fedpeft.federate import Watcher, federate
from fedpeft.memory import FolderMemory
from fedpeft.runs import RunFolder
from fedpeft.strategy import Strategy, sent
from fedpeft.tasks import Encoded, Task
from fedpeft.training import TorchLearner
from fedpeft.updates import ServerState
from fedpeft.wire import Failure, Packet, Transport, read_update
from simulations.privacy.views import Aggregate, ClientDelta, FinalAdapter, Public

SiteOf = Callable[[int], Site]
"""The client of a partition."""

Replies = Iterator[tuple[int, Packet | Failure]]
"""What came back, by partition."""

Wrap = Callable[[Transport, Callable[[], ServerState]], Transport]
"""Puts something between the server and the nodes; it is also given what the server's state is now."""

Batches = Mapping[tuple[int, int], tuple[Encoded, ...]]
"""The examples that were trained on, by round and partition: what is true, which no adversary is given."""


@dataclass(frozen=True)
class Recorded:
    """The views of a run, in the order in which they came about, its journal, and the batches that were trained on."""

    clients: tuple[ClientDelta, ...]
    aggregates: tuple[Aggregate, ...]
    final: FinalAdapter
    journal: list[dict[str, Any]]
    batches: Batches


def record(config: RunConfig, sites: SiteOf | None = None, wrap: Wrap | None = None) -> Recorded:
    """The run that `config`, which must be resolved, describes, recorded.

    `sites` take the place of the run's own; `wrap` puts something between the server and them, such as attackers.

    Raises:
        FedPeftError: the plan is forbidden, or the run failed.
    """
    strategy, notes = strategy_of(config), _Notes()
    clients = _witnessed(sites or (lambda partition: site_of(config, partition)), notes)
    with tempfile.TemporaryDirectory() as name:
        folder = RunFolder(Path(name))
        local = LocalTransport(config.federation.clients, clients, FolderMemory(folder.memories))
        between = wrap(local, lambda: notes.states[-1]) if wrap else local
        transport = Between(between, lambda requests, replies: _noted(notes, strategy, requests, replies))
        watcher = Watcher(
            lambda start, round_: notes.states.append(checkpoint.load(folder.checkpoint)),  # noqa: ARG005
            lambda round_, partition, usable: None,  # noqa: ARG005
            lambda done: notes.states.append(checkpoint.load(folder.checkpoint)),  # noqa: ARG005
            lambda name: None,  # noqa: ARG005
        )
        journal = federate(config, folder, transport, engine="local", watcher=watcher)
    steps = zip(notes.states[:-1], notes.states[1:], strict=True)
    return Recorded(
        tuple(notes.clients),
        tuple(Aggregate(after.round, before.adapter, after.adapter) for before, after in steps),
        FinalAdapter(strategy.finalize(notes.states[-1])),
        journal,
        notes.batches,
    )


def sites_with(config: RunConfig, rows: Callable[[int], Sequence[Row]]) -> SiteOf:
    """The run's sites with other rows: `rows(partition)`, repeats and all."""
    made: dict[int, Site] = {}

    def client(partition: int) -> Site:
        if partition not in made:
            made[partition] = site_of(config, partition, own_rows=lambda _: rows(partition))
        return made[partition]

    return client


def public_of(config: RunConfig, rows: Sequence[Row] = ()) -> Public:
    """What everybody knows of a run, with public `rows`."""
    return Public(adapted_model(config), task_of(config), config.training, tuple(rows))


def require_views(views: Sequence[object], what: str) -> None:
    """Raises PlanError if there are no such views: what an adversary does not see, it cannot attack."""
    if not views:
        raise PlanError(
            sentence(
                f"view {what}",
                expected="updates that the server can read",
                found="none",
                remedy="choose another view, or settings under which the server sees each update",
            )
        )


@dataclass(frozen=True)
class Between:
    """A transport with something between the server and the nodes.

    `pass_on(requests, replies)` yields what the server gets of the replies to its requests, by partition.
    """

    inner: Transport
    pass_on: Callable[[Mapping[int, Packet], Replies], Replies]

    def partitions(self) -> tuple[int, ...]:
        """See Transport."""
        return self.inner.partitions()

    def exchange(self, requests: Mapping[int, Packet], timeout_seconds: float) -> Replies:
        """See Transport."""
        return self.pass_on(requests, self.inner.exchange(requests, timeout_seconds))

    def late(self) -> Replies:
        """See Transport."""
        return self.inner.late()


@dataclass
class _Notes:
    """What is noted while the run goes on; `drawn` are the examples of the fit that is under way, by partition."""

    states: list[ServerState] = field(default_factory=list)
    clients: list[ClientDelta] = field(default_factory=list)
    batches: dict[tuple[int, int], tuple[Encoded, ...]] = field(default_factory=dict)
    drawn: dict[int, list[Encoded]] = field(default_factory=dict)


def _noted(notes: _Notes, strategy: Strategy, requests: Mapping[int, Packet], replies: Replies) -> Replies:
    for partition, reply in replies:
        _note(notes, strategy, requests[partition], partition, reply)
        yield partition, reply


def _note(notes: _Notes, strategy: Strategy, request: Packet, partition: int, reply: Packet | Failure) -> None:
    if request.kind == "evaluate" or isinstance(reply, Failure):
        return
    round_ = int(request.manifest["round"])
    if drawn := notes.drawn.get(partition):
        notes.batches[round_, partition] = tuple(drawn)
    adapter = notes.states[-1].adapter
    spec = at_rank(adapter.spec, int(request.manifest.get("rank", 0)))
    expected = {key: request.manifest[key] for key in ("version", "run", "config", "spec", "round")}
    try:
        update = read_update(reply, strategy, spec, {**expected, "partition": partition})
    except FedPeftError:  # what the server cannot read, or refuses, is no view
        return
    received = replace(sent(adapter, update.spec), residual=adapter.residual)
    notes.clients.append(ClientDelta(partition, round_, received, update.delta, update.examples, update.tokens))


def _witnessed(sites: SiteOf, notes: _Notes) -> SiteOf:
    """The same sites, whose every batch is noted as it is put together."""

    def client(partition: int) -> Site:
        site, drawn = sites(partition), notes.drawn.setdefault(partition, [])
        drawn.clear()
        if not isinstance(site.learner, TorchLearner):
            return site
        return replace(site, learner=replace(site.learner, task=_noting(site.learner.task, drawn)))

    return client


def _noting(task: Task, drawn: list[Encoded]) -> Task:
    def collate(examples: Sequence[Any], pad: int, device: Any) -> Any:
        drawn.extend(examples)
        return task.collate(examples, pad, device)

    return task._replace(collate=collate)
