"""Adapter layers that peft lacks: bottlenecks, scales and shifts, trained biases and norms, masks over weights."""

from fedpeft.own_layers.folders import SETTINGS, load, save
from fedpeft.own_layers.install import install, remove, retrain
from fedpeft.own_layers.layers import base_of, canonical, trainable
from fedpeft.own_layers.masks import masks, places_at, spots, take_masks
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
    "masks",
    "merge",
    "places_at",
    "remove",
    "retrain",
    "save",
    "spots",
    "switched_off",
    "take_masks",
    "trainable",
]
