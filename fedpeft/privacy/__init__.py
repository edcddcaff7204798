"""Differential privacy: mechanisms, samplers, and the account of what a run has spent."""

from fedpeft.privacy.accountant import affordable, calibrated, epsilon
from fedpeft.privacy.bands import column_norm, square_root
from fedpeft.privacy.central import Central, private
from fedpeft.privacy.channel import Channel, ClientNoise
from fedpeft.privacy.clipping import Adaptive, count_noise, update_noise
from fedpeft.privacy.entropy import SOURCES
from fedpeft.privacy.local import noisy
from fedpeft.privacy.mechanism import CLIENT, EXAMPLE, Mechanism
from fedpeft.privacy.samplers import SAMPLERS, Population

__all__ = [
    "CLIENT",
    "EXAMPLE",
    "SAMPLERS",
    "SOURCES",
    "Adaptive",
    "Central",
    "Channel",
    "ClientNoise",
    "Mechanism",
    "Population",
    "affordable",
    "calibrated",
    "column_norm",
    "count_noise",
    "epsilon",
    "noisy",
    "private",
    "square_root",
    "update_noise",
]
