"""Codecs: how tensors become bytes."""

from fedpeft.codecs.codec import Codec
from fedpeft.codecs.coded import coded
from fedpeft.codecs.dense import dense
from fedpeft.codecs.downlink import as_sent, first_sent, moved, next_sent
from fedpeft.codecs.entropy import Entropy, zstd
from fedpeft.codecs.reduction import Reduction, low_rank, top_k
from fedpeft.codecs.rounding import ROUNDINGS, Rounding, bf16, steps

__all__ = [
    "ROUNDINGS",
    "Codec",
    "Entropy",
    "Reduction",
    "Rounding",
    "as_sent",
    "bf16",
    "coded",
    "dense",
    "first_sent",
    "low_rank",
    "moved",
    "next_sent",
    "steps",
    "top_k",
    "zstd",
]
