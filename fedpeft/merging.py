"""Merging adapters that already exist: stock peft folders in, one out, with its error against the exact mean."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from fedpeft.adapter_folders import StoredAdapter, read_adapter_folder, write_adapter_folder
from fedpeft.adapters import AdapterSpec, AdapterState, ModuleSpec, at_ranks, factors, low_rank_modules
from fedpeft.config.fields import choose
from fedpeft.config.merges import MERGES
from fedpeft.errors import AdapterError, PlanError, sentence
from fedpeft.merges import Contribution, Merged, Method, exactness, products
from fedpeft.updates import ServerState, Update

_NEEDED = 1e-7
"""Singular values below this, over the greatest, are float32 rounding of what the folders hold."""


@dataclass(frozen=True)
class MergedAdapter:
    """One adapter made of several, and how far it is from the exact mean T = Σ p_k s_k B_k A_k of what they do.

    `report` holds ‖merged − T‖_F / ‖T‖_F, effective ranks of T and the tails that the merged ranks cannot hold.
    `shares` are the p_k.
    """

    state: AdapterState
    report: exactness.Report
    sources: tuple[StoredAdapter, ...]
    shares: tuple[float, ...]

    def write(self, folder: Path) -> None:
        """`folder`, which must not hold anything yet, is the merged adapter as stock peft loads it.

        Raises:
            AdapterError: the folder is not empty.
            RunFolderError: the disk is full or not writable.
        """
        embeddings = {path for source in self.sources for path in source.embeddings}
        write_adapter_folder(folder, self.state, _settings(self.sources), embeddings)


def merge(
    folders: Sequence[Path | str],
    method: str = "flora",
    *,
    weights: Sequence[float] = (),
    rank: int = 0,
    missing: str = "zero",
) -> MergedAdapter:
    """One adapter that does what the adapters in `folders` do on the mean.

    They may be of unlike rank, alpha and target modules. `weights` are one for each folder (none: all alike).
    `rank` compresses the result (0: the rank that the method needs, with which `flora` and `fedex` are exact). A
    module that an adapter lacks is no change for it ("zero"), or is averaged over those that have it ("covered");
    a head is averaged over those that have one.

    Raises:
        AdapterError: a folder is not a plain LoRA adapter, or two of them are for different models.
        PlanError: the weights are not usable, or the method cannot serve these adapters.
        ConfigError: there is no such method, or no such way to count what is missing.
    """
    sources = tuple(read_adapter_folder(Path(folder)) for folder in folders)
    shares = _shares(weights, len(sources))
    chosen = _method(method, missing)
    _require_fit(method, chosen, sources)
    spec = _union(sources, rank)
    zeros = {key: np.zeros(shape, np.float32) for key, shape in spec.shapes.items()}
    state = ServerState(run="merge", round=0, seed=0, adapter=AdapterState(spec, zeros))
    fold, target = chosen.merge.init(state, tuple(spec.shapes), ()), exactness.begin()
    for source, share in zip(sources, shares, strict=True):
        nothing = {key: np.zeros_like(value) for key, value in source.state.tensors.items()}
        received = AdapterState(source.state.spec, nothing)
        update = Update(source.state.spec, source.state.tensors, examples=1, tokens=1)
        fold = chosen.merge.add(fold, Contribution(update, received, share))
        modules = low_rank_modules(source.state.spec)
        target = exactness.add(target, modules, nothing, source.state.tensors, share)
    merged = chosen.merge.finish(fold)
    result = _compressed(spec, merged, rank)
    exact = exactness.means(target, missing)
    applied = {module.path: factors(module, result.tensors) for module in low_rank_modules(result.spec)}
    spectra = {path: products.spectrum(mean, applied[path].rank) for path, mean in exact.items()}
    return MergedAdapter(result, exactness.report(exact, applied, spectra), sources, shares)


def _shares(weights: Sequence[float], count: int) -> tuple[float, ...]:
    if count == 0:
        raise PlanError(sentence("merge", expected="at least one adapter folder", found="none", remedy="name some"))
    given = tuple(float(weight) for weight in weights) or (1.0,) * count
    if len(given) != count or not all(math.isfinite(weight) and weight > 0 for weight in given):
        raise PlanError(
            sentence(
                "weights",
                expected=f"{count} numbers above 0, one for each adapter",
                found=", ".join(f"{weight:g}" for weight in given),
                remedy="correct them, or leave them out to weigh all alike",
            )
        )
    return tuple(weight / sum(given) for weight in given)


def _method(name: str, missing: str) -> Method:
    """The method of that name; settings that it does not have are not offered."""
    kind: type = type(choose(MERGES, name).chosen)
    has_missing = any(item.name == "missing" for item in fields(kind))
    chosen: Method = (kind(missing=missing) if has_missing else kind()).build()
    return chosen


def _require_fit(name: str, method: Method, sources: tuple[StoredAdapter, ...]) -> None:
    """Raises PlanError unless the method can serve adapters of which nothing but their factors is known."""
    hidden = (*method.frozen, *method.local, *method.alternating)
    if hidden or (method.kinds and "lora" not in method.kinds):
        raise PlanError(
            sentence(
                f"method {name}",
                expected="one that merges both factors of finished adapters",
                found="one that shares or trains only one of them, round by round",
                remedy="choose flora, fedex, flexlora, lora_fair, hetlora, zero_pad or fedavg",
            )
        )
    if len(sources) < method.merge.least:
        remedy = "give more, or choose a rule that averages"
        least = f"at least {method.merge.least} adapters"
        raise PlanError(sentence(f"method {name}", expected=least, found=len(sources), remedy=remedy))
    ranks = {module.rank for source in sources for module in low_rank_modules(source.state.spec)}
    if not method.merge.mixed and len(ranks) > 1:
        found = ", ".join(map(str, sorted(ranks)))
        raise PlanError(
            sentence(f"method {name}", expected="one rank", found=f"ranks {found}", remedy="choose flora or flexlora")
        )


def _union(sources: tuple[StoredAdapter, ...], rank: int) -> AdapterSpec:
    """Every module that some adapter has, at the greatest rank that one has there, or at `rank` where that is more.

    Raises:
        AdapterError: two adapters have a tensor in unlike shapes.
    """
    if rank < 0:
        raise PlanError(sentence("rank", expected="0 or more", found=rank, remedy="correct it"))
    found: dict[str, tuple[ModuleSpec, Path]] = {}
    for source in sources:
        for module in source.state.spec.modules:
            held, holder = found.setdefault(module.path, (module, source.folder))
            wanted = at_ranks(AdapterSpec("", "lora", (module,)), {module.path: held.rank}).modules[0]
            if (wanted.kind, wanted.shapes) != (held.kind, held.shapes):
                raise AdapterError(
                    sentence(
                        f"{source.folder}, module {module.path}",
                        expected=f"shapes as in {holder}: {dict(held.shapes)}",
                        found=str(dict(wanted.shapes)),
                        remedy="merge adapters of one base model and task",
                    )
                )
            if module.rank > held.rank:
                found[module.path] = (module, holder)
    spec = AdapterSpec(
        sources[0].state.spec.base_model, "lora", tuple(module for _, (module, _) in sorted(found.items()))
    )
    return at_ranks(spec, {module.path: max(module.rank, rank) for module in spec.modules if module.rank})


def _compressed(spec: AdapterSpec, merged: Merged, rank: int) -> AdapterState:
    """The adapter with what was meant for the base in it, at the rank that this needs, or at `rank`."""
    tensors, ranks = {key: merged.delta[key] for key in spec.shapes}, {}
    for module in low_rank_modules(spec):
        product = factors(module, merged.delta)
        extra = merged.residual.get(module.path)
        if extra is not None:
            product = products.trimmed(products.stack([extra, product]), _NEEDED)
        if rank:
            product = products.truncate(product, rank).factors
        ranks[module.path] = product.rank
        tensors |= {f"{module.path}.A": product.a.astype(np.float32), f"{module.path}.B": product.b.astype(np.float32)}
    return AdapterState(at_ranks(spec, ranks), tensors)


def _settings(sources: tuple[StoredAdapter, ...]) -> dict[str, Any]:
    """The first adapter's settings, with the heads of all."""
    saved = [name for source in sources for name in source.config.get("modules_to_save") or []]
    return {**sources[0].config, "modules_to_save": sorted(set(saved)) or None}
