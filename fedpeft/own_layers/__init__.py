"""Adapter layers that peft lacks: bottlenecks, scaling and shifting, and trained biases and norms."""

from fedpeft.own_layers.folders import SETTINGS, load, save
from fedpeft.own_layers.install import install, remove, retrain
from fedpeft.own_layers.layers import base_of, canonical, trainable
from fedpeft.own_layers.merging import merge
from fedpeft.own_layers.methods import OWN, Method
from fedpeft.own_layers.switch import disabled, switched_off

__all__ = [
    "OWN",
    "SETTINGS",
    "Method",
    "base_of",
    "canonical",
    "disabled",
    "install",
    "load",
    "merge",
    "remove",
    "retrain",
    "save",
    "switched_off",
    "trainable",
]
