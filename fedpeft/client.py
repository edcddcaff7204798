"""The client: one function from a request and a memory to a reply and a memory, on every engine."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from fedpeft.adapters import AdapterSpec, AdapterState, Tensors, norm
from fedpeft.errors import FedPeftError, PacketError, sentence
from fedpeft.strategy import Strategy
from fedpeft.updates import Memory, Update
from fedpeft.version import VERSION
from fedpeft.wire import Packet, Scalar, fit_reply, read_adapter, require_manifest

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FitJob:
    """What a client is to do in one round; `position` is how many batches it has seen in rounds before."""

    round: int
    partition: int
    frozen: tuple[str, ...]
    position: int


@dataclass(frozen=True)
class Fitted:
    """What training did: the tensors before (as the model held them) and after, and how much was seen."""

    before: Tensors
    after: Tensors
    examples: int
    tokens: int
    position: int
    metrics: Mapping[str, float]


class Learner(Protocol):
    """A model and one site's data."""

    @property
    def spec(self) -> AdapterSpec:
        """The specification of the adapter that this learner trains."""
        ...

    def fit(self, adapter: AdapterState, job: FitJob) -> Fitted:
        """Trains from `adapter`."""
        ...

    def evaluate(self, adapter: AdapterState) -> Mapping[str, float]:
        """Figures of `adapter` on this site's rows, `rows` among them."""
        ...


@dataclass(frozen=True)
class Site:
    """All that a client has of its own: its partition, the digest of its settings, and its learner."""

    partition: int
    config: str
    strategy: Strategy
    learner: Learner


def handle(packet: Packet, memory: Memory, site: Site) -> tuple[Packet, Memory]:
    """The client's reply and its memory after it.

    Whatever goes wrong here is told to the server as a packet of kind `failure`, and the memory stays as it was.
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
        return _failure(packet, site, f"{type(error).__name__}: {error}"), memory


def _fit(packet: Packet, memory: Memory, site: Site) -> tuple[Packet, Memory]:
    spec = _agree(packet, site)
    stage = site.strategy.stage
    local = stage.local(spec)
    adapter = _personal(read_adapter(packet, site.strategy, spec), memory, local)
    job = FitJob(
        round=int(packet.manifest["round"]),
        partition=site.partition,
        frozen=stage.frozen(spec),
        position=int(memory.fields.get("position", 0)),
    )
    fitted = site.learner.fit(adapter, job)
    spec.require(fitted.after, f"training, round {job.round}, partition {job.partition}")
    delta = {key: fitted.after[key] - fitted.before[key] for key in spec.shapes}
    update = Update(spec, delta, fitted.examples, fitted.tokens, metrics=fitted.metrics)
    kept = Memory(
        {**memory.tensors, **{key: np.array(fitted.after[key]) for key in local}},
        {**memory.fields, "position": fitted.position},
    )
    update, kept = stage.client(update, kept)
    update = replace(update, metrics={**update.metrics, "update_norm": norm(update.delta)})
    return fit_reply(site.strategy, update, _manifest(packet, site)), kept


def _evaluate(packet: Packet, memory: Memory, site: Site) -> tuple[Packet, Memory]:
    spec = _agree(packet, site)
    adapter = _personal(read_adapter(packet, site.strategy, spec), memory, site.strategy.stage.local(spec))
    figures = site.learner.evaluate(adapter)
    metrics = {f"metric.{key}": float(value) for key, value in figures.items()}
    return Packet("evaluation", {**_manifest(packet, site), **metrics}), memory


_HANDLERS: Mapping[str, Callable[[Packet, Memory, Site], tuple[Packet, Memory]]] = {"fit": _fit, "evaluate": _evaluate}


def _agree(packet: Packet, site: Site) -> AdapterSpec:
    spec = site.learner.spec
    require_manifest(packet, packet.kind, {"version": VERSION, "config": site.config, "spec": spec.digest})
    return spec


def _personal(adapter: AdapterState, memory: Memory, local: tuple[str, ...]) -> AdapterState:
    own = {key: memory.tensors[key] for key in local if key in memory.tensors}
    return replace(adapter, tensors={**adapter.tensors, **own})


def _manifest(packet: Packet, site: Site) -> dict[str, Scalar]:
    common = ("version", "run", "config", "spec", "round")
    return {**{key: packet.manifest[key] for key in common if key in packet.manifest}, "partition": site.partition}


def _failure(packet: Packet, site: Site, reason: str) -> Packet:
    return Packet("failure", {**_manifest(packet, site), "reason": reason})
