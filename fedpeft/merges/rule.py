"""Align, combine, project: every merge that averages, put together from a weighting and a projection.

Contributions fold into two sums as they arrive: the mean of deltas, padded to the server's rank, and the exact
mean of products, stacked. The projection turns them into the server's next adapter. The exact mean also says
how exact that was.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

from fedpeft.adapters import RANK_AXES, Factors, ModuleSpec, factors, norm
from fedpeft.errors import FederationError
from fedpeft.merges import exactness, padded, products
from fedpeft.merges.merge import WEIGHTS, Contribution, Merge, Merged
from fedpeft.merges.projections import Gathered, Project, Projected, as_is
from fedpeft.updates import ServerState

Reweigh = Callable[[Contribution, tuple[ModuleSpec, ...]], float]
"""What the low-rank tensors of a contribution weigh, where that is not what its other tensors weigh."""


class _Fold(NamedTuple):
    """A round so far: the state before it, what is measured, and the sums."""

    state: ServerState
    modules: tuple[ModuleSpec, ...]
    plain: padded.Sums
    low_rank: padded.Sums
    weights: tuple[float, float]
    squares: float
    target: exactness.Target


def as_given(contribution: Contribution, modules: tuple[ModuleSpec, ...]) -> float:  # noqa: ARG001
    """The weight that the contribution came with."""
    return contribution.weight


def by_product_norm(contribution: Contribution, modules: tuple[ModuleSpec, ...]) -> float:
    """‖B_k A_k‖_F over all low-rank modules: clients whose adapter does little count for little.

    Source: HetLoRA, Cho et al. 2024, "Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation
    Models", section 4.2 (sparsity-weighted aggregation).
    """
    received, delta = contribution.received.tensors, contribution.update.delta
    found = (factors(module, received, delta) for module in exactness.held(modules, received))
    return math.sqrt(sum(max(0.0, products.inner(one, one)) for one in found))


def rule(
    weights: str,
    project: Project = as_is,
    *,
    missing: str = "zero",
    reweigh: Reweigh = as_given,
    mixed: bool = True,
    gauge: str = "kept",
    whole: bool = False,
    drifts: bool = False,
) -> Merge:
    """The merge that weighs by the rule named `weights`, averages, and projects.

    Its measures are `drift`, the weighted root mean square distance of the clients' deltas from their mean over
    the norm of the mean (NaN where that is zero, or an update stands for several clients), and, where the server sees
    both factors of low-rank modules, `merge_error`, `effective_rank`s and `tail`s of the exact mean (see `exactness`).
    """

    def init(state: ServerState, keys: Collection[str], hidden: Collection[str]) -> _Fold:
        spec = state.adapter.spec
        modules = exactness.measured_modules(spec, hidden)
        low = {f"{m.path}.{name}" for m in spec.modules for name, axes in RANK_AXES.get(m.kind, {}).items() if axes}
        plain, low_rank = (
            padded.begin({key: spec.shapes[key] for key in keys if (key in low) is ranked}) for ranked in (False, True)
        )
        return _Fold(state, modules, plain, low_rank, (0.0, 0.0), 0.0, exactness.begin())

    def add(fold: _Fold, contribution: Contribution) -> _Fold:
        weight = contribution.weight
        delta = contribution.update.delta
        low_weight = reweigh(contribution, fold.modules)
        received = contribution.received.tensors
        return fold._replace(
            plain=padded.add(fold.plain, delta, weight),
            low_rank=padded.add(fold.low_rank, delta, low_weight),
            weights=(fold.weights[0] + weight, fold.weights[1] + low_weight),
            squares=fold.squares + (weight * norm(delta) ** 2 if contribution.update.count == 1 else math.nan),
            target=exactness.add(
                fold.target,
                exactness.held(fold.modules, received),
                received,
                delta,
                weight,
                contribution.update.lacks,
            ),
        )

    def finish(fold: _Fold) -> Merged:
        weight, low_weight = fold.weights
        if weight <= 0:
            raise FederationError("merge: expected at least one update of positive weight, found none; check quorum.")
        before = fold.state.adapter.tensors
        mean = padded.mean(fold.plain, before, weight, "covered")  # a head is averaged over those that have one
        mean |= padded.mean(fold.low_rank, before, low_weight or 1.0, missing if low_weight else "covered")
        exact = exactness.means(fold.target, missing)
        gathered = Gathered(fold.state, fold.modules, mean, exact)
        projected = project(gathered)
        size = norm(mean)
        variance = max(0.0, fold.squares / weight - size**2)
        drift = {"drift": math.sqrt(variance) / size if size else math.nan}
        return Merged(
            projected.delta,
            projected.residual,
            {**drift, **_exactness(gathered, projected, exactness.lacking(fold.target))},
        )

    plain = project is as_is and reweigh is as_given
    return Merge(
        init,
        add,
        finish,
        WEIGHTS[weights],
        reads="sum" if plain else "each",
        linear=plain,
        mixed=mixed,
        gauge=gauge,
        whole=whole,
        drifts=drifts,
    )


def _exactness(
    gathered: Gathered, projected: Projected, lacks: Mapping[str, float]
) -> Mapping[str, float | Mapping[str, float]]:
    """The journal's figures of what a projection did with the exact mean, of which nobody knows what it `lacks`."""
    if not gathered.modules:
        return {}
    before, applied, spectra = gathered.state.adapter.tensors, {}, {}
    for module in gathered.modules:
        path, exact = module.path, gathered.exact[module.path]
        after = factors(module, before, projected.delta)
        extra: Factors | None = projected.residual.get(path)
        applied[path] = products.stack([after, extra]) if extra else after
        spectra[path] = projected.spectra.get(path) or products.spectrum(exact, module.rank)
    found = exactness.report(gathered.exact, applied, spectra, lacks)
    return {
        "merge_error": found.error,
        "merge_errors": found.errors,
        "effective_ranks": found.effective_ranks,
        "tail": found.tail,
        "tails": found.tails,
        **({"merge_lacks": found.lacks} if lacks else {}),
    }
