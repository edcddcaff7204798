"""Codecs: how tensors become bytes."""

from fedpeft.codecs.codec import Codec
from fedpeft.codecs.dense import dense

__all__ = ["Codec", "dense"]
