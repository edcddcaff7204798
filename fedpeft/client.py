"""The client: one function from a request and a memory to a reply and a memory, on every engine."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np

from fedpeft import feedback
from fedpeft.adapters import AdapterSpec, AdapterState, Tensors, at_rank, fit, greatest_rank, norm, resized
from fedpeft.errors import FedPeftError, PacketError, sentence
from fedpeft.merges import Pruning
from fedpeft.pruning import pruned_spec
from fedpeft.requests import Received, read_request
from fedpeft.secure_client import Identity, Party, answer_phase, joining
from fedpeft.strategy import Strategy
from fedpeft.updates import Memory, Update
from fedpeft.version import VERSION
from fedpeft.wire import Packet, Scalar, require_manifest

CONTROL = "control/"
"""What a memory's keys begin with where it keeps the client's control variate."""

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FitJob:
    """What a client is to do in one round.

    `position` is how many batches it has seen in rounds before. `correction` is added to the gradients of the
    tensors that it names. `pruning` penalises the last ranks.
    """

    round: int
    partition: int
    frozen: tuple[str, ...]
    position: int
    correction: Tensors = field(default_factory=dict)
    pruning: Pruning | None = None


@dataclass(frozen=True)
class Fitted:
    """What training did: the tensors before (as the model held them) and after, and how much was seen.

    `gradients` are the means over the steps, before any correction, of the tensors that `FitJob.correction` names.
    """

    before: Tensors
    after: Tensors
    examples: int
    tokens: int
    position: int
    metrics: Mapping[str, float]
    gradients: Tensors = field(default_factory=dict)


class Learner(Protocol):
    """A model and one site's data."""

    @property
    def spec(self) -> AdapterSpec:
        """The specification of the adapter that this learner trains."""
        ...

    @property
    def start(self) -> AdapterState:
        """The adapter before any training, as the base, the settings and the seed have it."""
        ...

    def fit(self, adapter: AdapterState, job: FitJob) -> Fitted:
        """Trains from `adapter`."""
        ...

    def evaluate(self, adapter: AdapterState) -> Mapping[str, float]:
        """Figures of `adapter` on this site's rows, `rows` among them."""
        ...


@dataclass(frozen=True)
class InPlace:
    """What stands for the learner `inner` and trains in its own way; all else is the learner's."""

    inner: Learner

    @property
    def spec(self) -> AdapterSpec:
        """See Learner."""
        return self.inner.spec

    @property
    def start(self) -> AdapterState:
        """See Learner."""
        return self.inner.start

    def fit(self, adapter: AdapterState, job: FitJob) -> Fitted:
        """See Learner."""
        return self.inner.fit(adapter, job)

    def evaluate(self, adapter: AdapterState) -> Mapping[str, float]:
        """See Learner."""
        return self.inner.evaluate(adapter)


@dataclass(frozen=True)
class Site:
    """All that a client has of its own: its partition, the digest of its settings, its learner.

    `rank` is the greatest that the node wants (0: no wish), `memory_bytes` what it has for training (0: unsaid),
    `least_cohort` the fewest clients in whose sum it takes part, over what the run asks for, `identity` who it is.
    """

    partition: int
    config: str
    strategy: Strategy
    learner: Learner
    rank: int = 0
    memory_bytes: int = 0
    least_cohort: int = 0
    identity: Identity = field(default_factory=Identity)


def handle(packet: Packet, memory: Memory, site: Site) -> tuple[Packet, Memory]:
    """The client's reply and its memory after it.

    Whatever goes wrong here is told to the server as a packet of kind `failure`, and the memory stays as it was. What
    nobody foresaw may quote a row or a path, so of that the server hears the kind alone.
    """
    try:
        handler = _HANDLERS.get(packet.kind)
        if handler is None:
            raise PacketError(
                sentence(
                    "request",
                    expected=f"one of {', '.join(_HANDLERS)}",
                    found=repr(packet.kind),
                    remedy="run the same version on both sides",
                )
            )
        return handler(packet, memory, site)
    except FedPeftError as error:
        return _failure(packet, site, str(error)), memory
    except Exception as error:  # a bug or a device fault on one node must not end the federation
        _logger.exception("partition %d failed in round %s", site.partition, packet.manifest.get("round"))
        return _failure(packet, site, f"{type(error).__name__}; the node's log says more"), memory


def _fit(packet: Packet, memory: Memory, site: Site) -> tuple[Packet, Memory]:
    strategy, spec = site.strategy, _agree(packet, site)
    received = _received(packet, memory, site, spec)
    adapter, kept, round_ = received.adapter, received.memory, int(packet.manifest["round"])
    shared = strategy.stage.shared(adapter.spec, round_)
    variate = _below(kept.tensors, CONTROL, shared)
    job = FitJob(
        round=round_,
        partition=site.partition,
        frozen=strategy.stage.frozen(adapter.spec, round_),
        position=int(memory.fields.get("position", 0)),
        correction={key: value - variate.get(key, np.float32(0)) for key, value in received.control.items()},
        pruning=strategy.pruning,
    )
    fitted = site.learner.fit(adapter, job)
    adapter.spec.require(fitted.after, f"training, round {job.round}, partition {job.partition}")
    own = pruned_spec(adapter.spec, fitted.before, fitted.after, strategy.pruning)
    before, after = resized(fitted.before, own), resized(fitted.after, own)
    shared = strategy.stage.shared(own, round_)
    delta = {key: after[key] - before[key] for key in shared.shapes}
    gradients = {key: fit(value, shared.shapes[key]) for key, value in fitted.gradients.items()}
    update = Update(
        shared,
        delta,
        fitted.examples,
        fitted.tokens,
        metrics=fitted.metrics,
        control={key: value - variate.get(key, np.float32(0)) for key, value in gradients.items()},
    )
    kept = Memory(
        {
            **kept.tensors,
            **{key: np.array(after[key]) for key in strategy.stage.local(own, round_)},
            **{f"{CONTROL}{key}": value for key, value in gradients.items()},
        },
        {**kept.fields, "position": fitted.position, **({"rank": greatest_rank(own)} if own != adapter.spec else {})},
    )
    update, kept = strategy.stage.client(update, kept)
    if strategy.channel:
        shared = strategy.stage.shared(spec, round_)
        passes = strategy.passes(spec, round_)
        return joining(packet, update, kept, _party(site), shared, adapter, _manifest(packet, site), passes)
    update = replace(update, metrics={**update.metrics, "update_norm": norm(update.delta)})
    return feedback.reply(strategy, update, kept, _manifest(packet, site), greatest_rank(own))


def _evaluate(packet: Packet, memory: Memory, site: Site) -> tuple[Packet, Memory]:
    received = _received(packet, memory, site, _agree(packet, site))
    figures = site.learner.evaluate(received.adapter)
    metrics = {f"metric.{key}": float(value) for key, value in figures.items()}
    return Packet("evaluation", {**_manifest(packet, site), **metrics}), memory


def _describe(packet: Packet, memory: Memory, site: Site) -> tuple[Packet, Memory]:
    _agree(packet, site)
    wishes = [rank for rank in (site.rank, int(memory.fields.get("rank", 0))) if rank]
    own: dict[str, Scalar] = {"rank": min(wishes, default=0), "memory_bytes": site.memory_bytes}
    return Packet("description", {**_manifest(packet, site), **own}), memory


def _secure(packet: Packet, memory: Memory, site: Site) -> tuple[Packet, Memory]:
    passes = site.strategy.passes(_agree(packet, site), int(packet.manifest["round"]))
    return answer_phase(packet, memory, _party(site), _manifest(packet, site), passes)


def _party(site: Site) -> Party:
    return Party(site.partition, site.strategy.channel, site.least_cohort, site.identity)


_HANDLERS: Mapping[str, Callable[[Packet, Memory, Site], tuple[Packet, Memory]]] = {
    "fit": _fit,
    "evaluate": _evaluate,
    "describe": _describe,
    "secure": _secure,
}


def _received(packet: Packet, memory: Memory, site: Site, spec: AdapterSpec) -> Received:
    """What the request brings, cut to the rank that the client has pruned itself to."""
    received = read_request(packet, site.strategy, spec, memory, lambda: site.learner.start)
    own = at_rank(received.adapter.spec, int(memory.fields.get("rank", 0)))
    return replace(
        received, adapter=replace(received.adapter, spec=own, tensors=resized(received.adapter.tensors, own))
    )


def _below(tensors: Tensors, prefix: str, spec: AdapterSpec) -> dict[str, np.ndarray]:
    """The tensors of `spec` that are kept under `prefix`, at its ranks."""
    return {
        key: fit(tensors[f"{prefix}{key}"], shape) for key, shape in spec.shapes.items() if f"{prefix}{key}" in tensors
    }


def _agree(packet: Packet, site: Site) -> AdapterSpec:
    spec = site.learner.spec
    require_manifest(packet, packet.kind, {"version": VERSION, "config": site.config, "spec": spec.digest})
    return spec


def _manifest(packet: Packet, site: Site) -> dict[str, Scalar]:
    common = ("version", "run", "config", "spec", "round")
    return {**{key: packet.manifest[key] for key in common if key in packet.manifest}, "partition": site.partition}


def _failure(packet: Packet, site: Site, reason: str) -> Packet:
    return Packet("failure", {**_manifest(packet, site), "reason": reason})
