"""What a published method is made of."""

from __future__ import annotations

from dataclasses import dataclass

from fedpeft.merges.merge import Merge


@dataclass(frozen=True)
class Pruning:
    """How a node lowers its own rank.

    The rows and columns past `keep` times its rank are penalised in training, by `penalty` times the product of
    their norms; if that product came out smaller than it was, they are dropped for good.

    Source: HetLoRA, Cho et al. 2024, "Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation
    Models", section 4.1 (rank self-pruning).
    """

    keep: float
    penalty: float


@dataclass(frozen=True)
class Method:
    """A merge, and what of a low-rank module is trained and shared with it.

    `frozen` and `local` are patterns of tensors that are not trained, and that stay with their site; of the two
    `alternating` ones the first is trained in odd rounds, the second in even ones. `kinds` are those of
    the modules that the method is for (none: all). `budget` bounds the rank of the residual (0: no bound). `sketch` is
    the width of the sketch by which sums alone give what the merge needs, as `sketch.width_of` reads it (None: they
    cannot).
    """

    merge: Merge
    frozen: tuple[str, ...] = ()
    local: tuple[str, ...] = ()
    alternating: tuple[str, ...] = ()
    pruning: Pruning | None = None
    kinds: tuple[str, ...] = ()
    budget: int = 0
    sketch: int | None = None
