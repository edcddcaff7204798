"""Settings of LoRA and its variants."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from fedpeft.adapters import Family, lora, lora_sb
from fedpeft.config.adapters.common import REPARAMETERISED, read_options, read_patterns
from fedpeft.config.fields import require, require_range


@dataclass(frozen=True)
class Lora:
    """Low-rank adaptation; empty `target_modules` takes peft's choice for the model, empty `layers` all layers.

    `target_modules` may be `all-linear`. `rank_pattern` and `alpha_pattern` give modules whose path ends in a pattern
    a rank and an alpha of their own, each `"pattern = number"`. With `dora` a magnitude for each row is trained too.
    With `freeze_a` A stays as the server drew it (LoRA-FA). B learns `b_rate` times as fast (LoRA+). `options` are
    further settings of peft's own configuration, each `"name = value"` with a value as in JSON.

    Sources: Hu et al. 2021, "LoRA"; Kalajdzievski 2023, "rsLoRA"; Liu et al. 2024, "DoRA"; Zhang et al. 2023,
    "LoRA-FA"; Hayou et al. 2024, "LoRA+: Efficient Low Rank Adaptation of Large Models", section 4.
    """

    group: ClassVar[str] = REPARAMETERISED
    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    rank_stabilised: bool = False
    target_modules: tuple[str, ...] = ()
    layers: tuple[int, ...] = ()
    dora: bool = False
    freeze_a: bool = False
    b_rate: float = 1.0
    rank_pattern: tuple[str, ...] = ()
    alpha_pattern: tuple[str, ...] = ()
    options: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        require_range(self, "rank", 1)
        require(self.alpha > 0, "alpha", expected="a number above 0", found=self.alpha)
        require_range(self, "dropout", 0.0, 0.99)
        require(self.b_rate > 0, "b_rate", expected="a number above 0", found=self.b_rate)
        both = self.dora and self.freeze_a
        require(
            not both, "freeze_a", expected="false with dora", found=True, remedy="set aggregation.merge.rule=ffa_lora"
        )
        ranks = read_patterns(self.rank_pattern, "rank_pattern").values()
        require(
            all(rank == int(rank) for rank in ranks), "rank_pattern", expected="whole ranks", found=self.rank_pattern
        )
        read_patterns(self.alpha_pattern, "alpha_pattern")
        drawn = read_options(self.options).get("init_lora_weights", True)
        require(
            drawn in (True, "gaussian", "orthogonal"),
            "options",
            expected="init_lora_weights of true, gaussian or orthogonal, which leave the base as it is",
            found=drawn,
            remedy="choose one of them; the others change the base, or need a client's rows",
        )

    def build(self) -> Family:
        """The family that these settings describe."""
        ranks = {pattern: int(rank) for pattern, rank in read_patterns(self.rank_pattern, "rank_pattern").items()}
        family = lora(
            rank=self.rank,
            alpha=self.alpha,
            dropout=self.dropout,
            rank_stabilised=self.rank_stabilised,
            target_modules=self.target_modules,
            layers=self.layers,
            dora=self.dora,
            freeze_a=self.freeze_a,
            rank_pattern=ranks,
            alpha_pattern=read_patterns(self.alpha_pattern, "alpha_pattern"),
        )
        rates = {"B": self.b_rate} if self.b_rate != 1.0 else {}
        return replace(family, peft={**family.peft, **read_options(self.options)}, rates=rates)


@dataclass(frozen=True)
class LoraSb:
    """LoRA-SB: fixed factors of each weight and a trained square matrix between them, rank² numbers a module.

    Empty `target_modules` takes peft's choice for the model, empty `layers` all layers. Goes with the merge `fed_sb`.
    """

    group: ClassVar[str] = REPARAMETERISED
    rank: int = 32
    alpha: float = 32.0
    dropout: float = 0.0
    target_modules: tuple[str, ...] = ()
    layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        require_range(self, "rank", 1)
        require(self.alpha > 0, "alpha", expected="a number above 0", found=self.alpha)
        require_range(self, "dropout", 0.0, 0.99)

    def build(self) -> Family:
        """The family that these settings describe."""
        return lora_sb(
            rank=self.rank,
            alpha=self.alpha,
            dropout=self.dropout,
            target_modules=self.target_modules,
            layers=self.layers,
        )
