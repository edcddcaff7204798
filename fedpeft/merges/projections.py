"""Projections: from the mean of factors and the exact mean of products to the adapter that the server keeps.

Each is a function of a `Gathered` round. What the adapter cannot hold may go into the base as a residual.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from fedpeft.adapters import Factors, ModuleSpec, Tensors, factors, solved
from fedpeft.merges import products
from fedpeft.randomness import rng
from fedpeft.updates import ServerState


@dataclass(frozen=True)
class Gathered:
    """All that a projection may read.

    `state` is the server's before the round, `modules` the low-rank modules of which every tensor is known,
    `mean` the mean delta of every shared tensor, `exact` the exact mean of each module's product.
    """

    state: ServerState
    modules: tuple[ModuleSpec, ...]
    mean: Tensors
    exact: Mapping[str, Factors]


@dataclass(frozen=True)
class Projected:
    """The delta of the adapter, what the base takes up, and the spectra of exact means where they were needed."""

    delta: Tensors
    residual: Mapping[str, Factors] = field(default_factory=dict)
    spectra: Mapping[str, products.Spectrum] = field(default_factory=dict)


Project = Callable[[Gathered], Projected]


def as_is(gathered: Gathered) -> Projected:
    """The mean of the factors.

    Source: FedIT, Zhang et al. 2024, "Towards Building the FederatedGPT", section 3.
    """
    return Projected(gathered.mean)


def truncated(gathered: Gathered) -> Projected:
    """The best adapter of the server's rank for the exact mean; smaller nodes hold its leading singular directions.

    Source: FlexLoRA, Bai et al. 2024, "Federated Fine-tuning of Large Language Models under Heterogeneous
    Tasks and Client Resources", section 3.2.
    """
    delta, spectra = dict(gathered.mean), {}
    for module in gathered.modules:
        nearest = products.truncate(gathered.exact[module.path], module.rank)
        spectra[module.path] = nearest.spectrum
        delta |= _moves(gathered, module, nearest.factors)
    return Projected(delta, {}, spectra)


def restarted(gathered: Gathered) -> Projected:
    """The exact mean goes into the base; the adapter begins anew: one factor drawn, the other zero.

    Source: FLoRA, Wang et al. 2024, "FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous
    Low-Rank Adaptations", eq. 6 and algorithm 1.
    """
    delta, residual = dict(gathered.mean), {}
    for module in gathered.modules:
        delta |= _moves(gathered, module, _fresh(gathered.state, module))
        residual[module.path] = gathered.exact[module.path]
    return Projected(delta, residual)


def with_residual(rank: int) -> Project:
    """The mean of the factors; what they miss of the exact mean goes into the base, at `rank` or less (0: all of it).

    Source: FedEx-LoRA, Singhal et al. 2024, "FedEx-LoRA: Exact Aggregation for Federated and Efficient
    Fine-Tuning of Foundation Models", eq. 11; with a rank, its section on inexact assignment by truncated SVD.
    """

    def project(gathered: Gathered) -> Projected:
        residual = {}
        for module in gathered.modules:
            applied = factors(module, gathered.state.adapter.tensors, gathered.mean)
            missed = products.difference(gathered.exact[module.path], applied)
            residual[module.path] = products.truncate(missed, rank).factors if rank else products.trimmed(missed)
        return Projected(gathered.mean, residual)

    return project


def corrected(strength: float) -> Project:
    """The mean of A, and B̄ moved toward the exact mean T: min over Δ of ‖T − (B̄ + Δ) Ā‖² + λ‖Δ‖².

    Δ = (T − B̄ Ā) Āᵀ (Ā Āᵀ + λ I)⁻¹, with λ = `strength` times the mean squared norm of a row of A, before the round
    or after, whichever is greater: so the gauge does not matter, and clients whose A cancel do not blow up B. The
    paper seeks Δ by gradient descent on a cosine distance; this is its least-squares form.

    Source: LoRA-FAIR, Bian et al. 2024, "LoRA-FAIR: Federated LoRA Fine-Tuning with Aggregation and
    Initialization Refinement", eq. 9.
    """

    def project(gathered: Gathered) -> Projected:
        delta = dict(gathered.mean)
        for module in gathered.modules:
            b, a = factors(module, gathered.state.adapter.tensors, gathered.mean)
            exact = gathered.exact[module.path]
            missed = exact.b @ (exact.a @ a.T) - b @ (a @ a.T)
            gram = a @ a.T
            before = factors(module, gathered.state.adapter.tensors).a
            size = max(float(np.trace(gram)), float(np.vdot(before, before))) / len(gram)
            ridge = strength * max(size, float(np.finfo(np.float64).tiny))
            step = np.linalg.solve(gram + ridge * np.eye(len(gram)), missed.T).T
            delta |= _moves(gathered, module, Factors(b + step, a))
        return Projected(delta)

    return project


def _moves(gathered: Gathered, module: ModuleSpec, after: Factors) -> dict[str, np.ndarray]:
    """The deltas that make a module do what `after` does, or what comes nearest to it."""
    tensors, found = gathered.state.adapter.tensors, {}
    for name, value in solved(module, tensors, after).items():
        key = f"{module.path}.{name}"
        with np.errstate(over="ignore"):  # what is beyond float32 is refused where the adapter is, in words
            found[key] = (value - tensors[key]).astype(np.float32)
    return found


def _fresh(state: ServerState, module: ModuleSpec) -> Factors:
    """Factors whose product is zero, drawn as peft draws them: A uniform in ±1/√in, or B normal on an embedding.

    Which of them is drawn is told by the adapter before the round, where the other one is zero.
    """
    random = rng(state.seed, state.round + 1, module.path, "restart")
    before = factors(module, state.adapter.tensors)
    if np.any(before.a) or not np.any(before.b):
        bound = 1.0 / np.sqrt(before.a.shape[1])
        return Factors(np.zeros_like(before.b), random.uniform(-bound, bound, before.a.shape))
    return Factors(module.scale * random.standard_normal(before.b.shape), np.zeros_like(before.a))
