"""Settings of families that train a share of the base's numbers, which the server chooses for all nodes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from fedpeft.adapters import Family, own_family
from fedpeft.config.adapters.common import SELECTIVE
from fedpeft.config.fields import require


@dataclass(frozen=True, kw_only=True)
class Masked:
    """A `share` of the numbers of the modules that `target_modules` and `layers` name (none: all but the head).

    They are those with the greatest squares of the loss's gradient, added over the `data.server_rows` rows that the
    server has, each with its own label: the diagonal of the empirical Fisher information. All parameters are ranked
    together, as in the papers, or where `balanced` each by itself, so that each has the same share. A head of the
    task's own is at its first, random values then, which favours the layer before it; it learns beside the mask.
    """

    group: ClassVar[str] = SELECTIVE
    share: float
    balanced: bool = False
    target_modules: tuple[str, ...] = ()
    layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        require(0 < self.share <= 1, "share", expected="a number above 0, at most 1", found=self.share)

    @property
    def common(self) -> dict[str, Any]:
        """What the layers are told."""
        where = {"target_modules": self.target_modules, "layers": self.layers}
        return {"share": self.share, "balanced": self.balanced, **where}


@dataclass(frozen=True, kw_only=True)
class FishMask(Masked):
    """FISH Mask: a small share is trained.

    Source: Sung et al. 2021, "Training Neural Networks with Fixed Sparse Masks", sections 3.1 and 3.2, with the
    empirical Fisher information. Places are chosen once, before the first round.
    """

    share: float = 0.005

    def build(self) -> Family:
        """The family that these settings describe."""
        return own_family("fish_mask", **self.common)


@dataclass(frozen=True, kw_only=True)
class ChildTuning(Masked):
    """Child-Tuning-D: a tenth or more is trained, the child network that a task's rows point out.

    Source: Xu et al. 2021, "Raise a Child in Large Language Model: Towards Effective and Generalizable Fine-tuning",
    section 2.2, the task-driven variant. Its masked gradient is that of the numbers which are trained here.
    """

    share: float = 0.1

    def build(self) -> Family:
        """The family that these settings describe."""
        return own_family("child_tuning", **self.common)
