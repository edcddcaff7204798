"""Settings of families whose change of the weight is a transform of a few numbers, or repeats a block of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fedpeft.adapters import Family, peft_family
from fedpeft.config.adapters.common import InLayers
from fedpeft.config.fields import require, require_range


@dataclass(frozen=True, kw_only=True)
class FewPlaces(InLayers):
    """Settings of a matrix with `frequencies` entries, at places drawn from `places_seed`, times `scaling`."""

    frequencies: int = 1000
    scaling: float = 150.0
    places_seed: int = 777

    def __post_init__(self) -> None:
        super().__post_init__()
        require_range(self, "frequencies", 1)
        require(self.scaling > 0, "scaling", expected="a number above 0", found=self.scaling)

    @property
    def common(self) -> dict[str, Any]:
        """What peft's configuration is told of these settings."""
        places = {"n_frequency": self.frequencies, "scaling": self.scaling, "random_loc_seed": self.places_seed}
        return {**places, **super().common}


@dataclass(frozen=True, kw_only=True)
class FourierFt(FewPlaces):
    """FourierFT: the change of the weight is the inverse Fourier transform of a spectrum with few entries.

    Source: Gao et al. 2024, "Parameter-Efficient Fine-Tuning with Discrete Fourier Transform", eq. 2 to 4.
    """

    def build(self) -> Family:
        """The family that these settings describe."""
        names = {"fourierft_spectrum": "spectrum"}
        return peft_family("fourierft", "FOURIERFT", names, **{"init_weights": True, **self.common})


@dataclass(frozen=True, kw_only=True)
class WaveFt(FewPlaces):
    """WaveFT: the change of the weight is the inverse wavelet transform of a matrix with few entries.

    Source: Bilican et al. 2025, "Exploring Sparsity for Parameter Efficient Fine Tuning Using Wavelets", section 3.
    """

    frequencies: int = 2592
    scaling: float = 25.0

    def build(self) -> Family:
        """The family that these settings describe."""
        return peft_family("waveft", "WAVEFT", {"waveft_spectrum": "spectrum"}, **self.common)


@dataclass(frozen=True, kw_only=True)
class C3a(InLayers):
    """C3A: the change of the weight consists of circulant blocks; `block_size` divides both its sides.

    Source: Chen et al. 2024, "Parameter-Efficient Fine-Tuning via Circular Convolution", section 3.
    """

    block_size: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        require_range(self, "block_size", 1)

    def build(self) -> Family:
        """The family that these settings describe."""
        arguments = {"block_size": self.block_size, "init_weights": True, **self.common}
        return peft_family("c3a", "C3A", {"c3a_kernel": "kernel"}, **arguments)


@dataclass(frozen=True, kw_only=True)
class Miss(InLayers):
    """MiSS: a block of `rank` rows that is repeated over the weight.

    Source: Kang and Yin 2024, "MiSS: Revisiting the Trade-off in LoRA with an Efficient Shard-Sharing Structure",
    eq. 3.
    """

    rank: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        require_range(self, "rank", 1)

    def build(self) -> Family:
        """The family that these settings describe."""
        return peft_family("miss", "MISS", {"miss_block": "block"}, **{"r": self.rank, **self.common})
