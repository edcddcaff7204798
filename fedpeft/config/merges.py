"""The table of the merges' names: every published method is one line."""

from __future__ import annotations

from fedpeft.config.averages import (
    FedAvg,
    FedEx,
    FedSaLora,
    FedSb,
    FfaLora,
    FlexLora,
    Flora,
    HetLora,
    LoraFair,
    RoLora,
    ZeroPad,
)
from fedpeft.config.fields import Table
from fedpeft.config.robust import Bulyan, GeometricMedian, Krum, Median, MultiKrum, NormBound, TrimmedMean

MERGES = Table(
    "rule",
    {
        "fedavg": FedAvg,
        "fedit": FedAvg,
        "zero_pad": ZeroPad,
        "hetlora": HetLora,
        "flora": Flora,
        "fedex": FedEx,
        "flexlora": FlexLora,
        "ffa_lora": FfaLora,
        "rolora": RoLora,
        "fedsa_lora": FedSaLora,
        "fed_sb": FedSb,
        "lora_fair": LoraFair,
        "median": Median,
        "trimmed_mean": TrimmedMean,
        "krum": Krum,
        "multi_krum": MultiKrum,
        "bulyan": Bulyan,
        "geometric_median": GeometricMedian,
        "norm_bound": NormBound,
    },
)
"""Every merge by its paper's name."""
