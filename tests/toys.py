"""A federation small enough to do by hand: three numbers, clients that walk towards a target of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from fedpeft import checkpoint, journal, ranks, rounds
from fedpeft.adapters import AdapterSpec, AdapterState, ModuleSpec, at_rank
from fedpeft.client import FitJob, Fitted, Site, handle
from fedpeft.codecs import dense
from fedpeft.engines.local import LocalTransport
from fedpeft.gathering import Asking
from fedpeft.memory import FolderMemory
from fedpeft.merges import Merge, Method, rule
from fedpeft.optimizers import sgd
from fedpeft.requests import fit_request
from fedpeft.stages import Stage, identity
from fedpeft.strategy import Parts, Strategy, build
from fedpeft.updates import Memory, ServerState, Update
from fedpeft.wire import Failure, Packet, Session

SPEC = AdapterSpec(
    "base",
    "lora",
    (
        ModuleSpec("head", "full", 0, 1.0, (("weight", (1,)),)),
        ModuleSpec("layer", "lora", 1, 2.0, (("A", (1, 1)), ("B", (1, 1)))),
    ),
)
# Two low-rank modules of rank 4 and unlike shape; the second has as many outputs as ranks. 1 + 26 numbers a rank.
WIDE = AdapterSpec(
    "base",
    "lora",
    (
        ModuleSpec("head", "full", 0, 1.0, (("weight", (1,)),)),
        ModuleSpec("left", "lora", 4, 2.0, (("A", (4, 7)), ("B", (6, 4)))),
        ModuleSpec("right", "lora", 4, 0.5, (("A", (4, 9)), ("B", (4, 4)))),
    ),
)
RUN, CONFIG = "run-1", "c0ffee"
SESSION = Session(RUN, CONFIG, SPEC.digest)
WIDE_SESSION = Session(RUN, CONFIG, WIDE.digest)


def numbers(head: float, a: float, b: float) -> dict[str, np.ndarray]:
    """Values for the three tensors of `SPEC`."""
    return {
        "head.weight": np.array([head], np.float32),
        "layer.A": np.array([[a]], np.float32),
        "layer.B": np.array([[b]], np.float32),
    }


def counted(rank: int = 4, spec: AdapterSpec = WIDE) -> dict[str, np.ndarray]:
    """Values 1, 2, 3 ... for the tensors of `spec` at `rank`."""
    start, found = 1, {}
    for key, shape in at_rank(spec, rank).shapes.items():
        size = int(np.prod(shape))
        found[key], start = np.arange(start, start + size, dtype=np.float32).reshape(shape), start + size
    return found


def flat(tensors: Mapping[str, np.ndarray]) -> list[float]:
    """The values of the tensors in order of key."""
    return [float(x) for key in sorted(tensors) for x in tensors[key].ravel()]


def bits(tensors: Any) -> dict[str, bytes]:
    """The bytes of each tensor, in order of key."""
    return {key: np.ascontiguousarray(value).tobytes() for key, value in sorted(tensors.items())}


def never() -> AdapterState:
    """For a request that counts on nothing a node would have to build."""
    raise AssertionError("nothing was to be built")


def state(*values: float, round_: int = 0, **more: Any) -> ServerState:
    return ServerState(RUN, round_, 0, AdapterState(SPEC, numbers(*(values or (0.0, 0.0, 0.0)))), **more)


def wide_state(round_: int = 0, **more: Any) -> ServerState:
    return ServerState(RUN, round_, 0, AdapterState(WIDE, counted(), more.pop("residual", {})), **more)


def parts(stage: Stage | None = None, rate: float = 1.0, merge: Merge | None = None, **method: Any) -> Parts:
    return Parts(stage or identity(), dense(), Method(merge or rule("examples"), **method), sgd(rate))


def strategy(stage: Stage | None = None, rate: float = 1.0, weights: str = "examples") -> Strategy:
    return build(parts(stage, rate, rule(weights)))


def update(values: tuple[float, float, float], examples: int = 1, tokens: int = 1, **metrics: float) -> Update:
    return Update(SPEC, numbers(*values), examples, tokens, metrics=metrics)


@dataclass(frozen=True)
class Toy:
    """Walks 1/(2 + position) of the way to 4 × (partition + 1) in every tensor that is not frozen.

    So a client that forgets its position, or remembers one too many, ends elsewhere.
    """

    partition: int
    examples: int = 2
    breaks: Callable[[FitJob], None] | None = None
    seen: list[AdapterState] = field(default_factory=list)
    jobs: list[FitJob] = field(default_factory=list)
    spec: AdapterSpec = SPEC

    @property
    def start(self) -> AdapterState:
        return AdapterState(self.spec, counted(spec=self.spec) if self.spec == WIDE else numbers(0, 0, 0))

    def fit(self, adapter: AdapterState, job: FitJob) -> Fitted:
        self.seen.append(adapter)
        self.jobs.append(job)
        if self.breaks:
            self.breaks(job)
        target, share = np.float32(4 * (self.partition + 1)), np.float32(1 / (2 + job.position))
        after = {
            key: value if key in job.frozen else value + share * (target - value)
            for key, value in adapter.tensors.items()
        }
        metrics = {"loss": float(self.partition), "learning_rate": 0.5}
        gradients = {key: np.full_like(value, self.partition + 1) for key, value in job.correction.items()}
        tokens, position = 10 * self.examples, job.position + 1
        return Fitted(adapter.tensors, after, self.examples, tokens, position, metrics, gradients)

    def evaluate(self, adapter: AdapterState) -> Mapping[str, float]:
        self.seen.append(adapter)
        return {"accuracy": float(adapter.tensors["head.weight"][0]), "rows": self.examples}


def site(
    partition: int,
    plan: Strategy | None = None,
    learner: Toy | None = None,
    config: str = CONFIG,
    rank: int = 0,
    memory_bytes: int = 0,
) -> Site:
    return Site(partition, config, plan or strategy(), learner or Toy(partition), rank, memory_bytes)


def transport(clients: int, root: Path, plan: Strategy | None = None, spec: AdapterSpec = SPEC) -> LocalTransport:
    return LocalTransport(clients, lambda p: site(p, plan, Toy(p, spec=spec)), FolderMemory(root))


def plan(**changes: Any) -> rounds.Plan:
    """A plan of two rounds and two clients with `changes` of it or of whom it asks."""
    asking = Asking(cohort=2, quorum=1, deadline_seconds=60.0, ranks=ranks.equal())
    asked = {item.name for item in fields(Asking)} & changes.keys()
    made = rounds.Plan(
        session=SESSION,
        rounds=2,
        asking=replace(asking, **{key: changes.pop(key) for key in asked}),
        evaluate_every=1,
        evaluate_on_clients=False,
        metric="accuracy",
        metric_sign=1,
        patience=0,
    )
    return replace(made, **changes)


@dataclass
class Script:
    """A transport that plays what it is told: `(partition, Packet | Failure | None)`; None is the honest reply."""

    replies: list[tuple[int, Packet | Failure | None]]
    clients: int = 2
    plan: Strategy = field(default_factory=strategy)

    def partitions(self) -> tuple[int, ...]:
        return tuple(range(self.clients))

    def exchange(
        self, requests: Mapping[int, Packet], timeout_seconds: float
    ) -> Iterator[tuple[int, Packet | Failure]]:
        for partition, reply in self.replies:
            if reply is not None:
                yield partition, reply
            else:
                yield partition, handle(requests[partition], Memory(), site(partition, self.plan))[0]


def honest(partition: int, round_: int = 1, plan: Strategy | None = None) -> Packet:
    """What an honest client answers in round `round_` to an adapter of zeros."""
    chosen = plan or strategy()
    request = fit_request(chosen, state(0, 0, 0, round_=round_ - 1), SESSION, partition)
    return handle(request, Memory(), site(partition, chosen))[0]


def nobody() -> rounds.Observer:
    return rounds.Observer(lambda *_: None, lambda *_: None)


def evaluate(adapter: AdapterState) -> dict[str, Any]:
    """The head's number as the accuracy."""
    return {"accuracy": float(adapter.tensors["head.weight"][0]), "rows": 1, "groups": {}}


def federate(
    root: Path, made: rounds.Plan, clients: int = 3, plan: Strategy | None = None, first: ServerState | None = None
) -> ServerState:
    """A run with journal, checkpoints and memories under `root`, taken up where an earlier one was cut off."""
    chosen, ledger, states = plan or strategy(), root / "journal.jsonl", root / "checkpoint"
    if states.exists() and list(states.glob("*.sha256")):
        start = checkpoint.load(states)
        journal.truncate(ledger, start.round)
    else:
        start = first or state()
        ledger.unlink(missing_ok=True)
        journal.append(ledger, {"event": "start"})
        checkpoint.save(states, start)

    def settle(record: rounds.Record, after: ServerState) -> None:
        journal.append(ledger, record)
        checkpoint.save(states, after)

    observer = rounds.Observer(lambda *_: None, settle)
    local = transport(clients, root / "memories", chosen, start.adapter.spec)
    final, _ = rounds.run(chosen, made, start, local, evaluate, observer)
    return final
