"""A channel on which the server learns the sum of updates alone: its settings, and updates as integers and back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from fedpeft.adapters import AdapterSpec, Tensors, fit
from fedpeft.privacy.central import clipped
from fedpeft.privacy.geometry import Sides, geometry
from fedpeft.privacy.secure.discrete_gaussian import concentration, discrete_gaussian
from fedpeft.privacy.secure.entropy import SYSTEM, Entropy
from fedpeft.privacy.secure.fixed_point import (
    Grid,
    quantised,
    quantised_within,
    real,
    rounded_norm,
    rounded_norm_1,
)
from fedpeft.privacy.secure.policy import Policy
from fedpeft.privacy.secure.terms import width_for

_BETA = math.exp(-0.5)
"""The chance that a rounding is drawn again: what Kairouz et al. 2021 take."""

_SLACK = 1.001
_MOST_TRIES = 10_000

_TAIL = 14.0
"""Standard deviations of a client's noise that a sum has room for: one in 10⁴³ draws is further out."""


@dataclass(frozen=True)
class ClientNoise:
    """Noise that clients add, each a share: their sum costs what a Gaussian with this `multiplier` does.

    `cohort` is the planned one, over which the sum is divided.

    Source: Kairouz et al. 2021, "The Distributed Discrete Gaussian Mechanism for Federated Learning with Secure
    Aggregation".
    """

    multiplier: float
    cohort: int


@dataclass(frozen=True)
class Channel:
    """What both ends of a secure sum go by.

    An update is clipped to a Euclidean norm of `clip_norm` and becomes integers of `bits` bits. `least_cohort` is the
    fewest clients whose sum is opened, `dropout` the share of them that may fall silent, `colluding` the share that
    may be in league with a hostile server. With `noise`, clients add some. `signed`: by the keys of nodes. `seed` is
    the run's: what rounding draws is no secret, masks hide the integers whatever they are rounded by.
    """

    clip_norm: float
    bits: int
    least_cohort: int
    dropout: float
    colluding: float
    noise: ClientNoise | None = None
    signed: bool = False
    seed: int = 0

    def roomier(self, times: float) -> Channel:
        """The channel with room for updates so many times as long."""
        return replace(self, clip_norm=times * self.clip_norm)

    @property
    def grid(self) -> Grid:
        """The integers that numbers become."""
        return Grid(self.clip_norm, self.bits)

    @property
    def policy(self) -> Policy:
        """What every client asks for, if its node asks for no more."""
        return Policy(self.least_cohort, self.dropout, self.colluding)

    def variance(self, clients: int, size: int) -> float:
        """The variance of one client's noise, in squared steps, where `clients` are invited and updates have `size`.

        The least with which the noise of those who stay and do not collude costs no more than is promised.
        """
        if self.noise is None:
            return 0.0
        honest = self.policy.least_present(clients) - self.policy.colluders(clients)
        reach = rounded_norm(self.clip_norm / self.grid.step, size, _BETA)
        target, found = 0.5 * self.noise.multiplier**-2, max(0.25, (self.noise.multiplier * reach) ** 2 / honest)
        for _ in range(_MOST_TRIES):
            if concentration(found, honest, reach, rounded_norm_1(reach, size), size) <= target:
                break
            found *= _SLACK
        return found

    def width(self, clients: int, size: int) -> int:
        """The bits of the sum's integers."""
        noise = math.ceil(_TAIL * math.sqrt(self.variance(clients, size)))
        return width_for(clients, self.grid.levels + noise)


def as_integers(
    channel: Channel,
    delta: Tensors,
    shared: AdapterSpec,
    sides: Mapping[str, Sides],
    clients: int,
    rounding: Entropy = SYSTEM,
) -> tuple[np.ndarray, float]:
    """`delta` as integers `(shared.parameters,)`, int64, at the server's ranks, and how long it was before clipping.

    Tensors stand in order of name, in the coordinates `sides`; what a client of lower rank does not hold is 0. Numbers
    are rounded up or down at random, so that their mean is themselves, and get this client's share of the noise, which
    is the operating system's, and the rounding with it; without noise the draws are those of `rounding`.
    """
    padded = {key: fit(delta[key], shape) for key, shape in shared.shapes.items()}
    there, size = clipped(padded, dict(sides), channel.clip_norm)
    flat = np.concatenate([there[key].ravel() for key in sorted(there)])
    flat = np.clip(flat, -channel.clip_norm, channel.clip_norm)
    if channel.noise is None:
        return quantised(flat, channel.grid, rounding), size
    whole = quantised_within(flat, channel.grid, channel.clip_norm * (1 + 1e-12), _BETA)
    return whole + discrete_gaussian(channel.variance(clients, flat.size), flat.size), size


def as_mean(
    channel: Channel, total: np.ndarray, clients: int, shared: AdapterSpec, sides: Mapping[str, Sides]
) -> Mapping[str, np.ndarray]:
    """The mean of the updates of so many clients whose integers sum to `total`, float32.

    With noise it is over the planned cohort, which does not follow who came.
    """
    over = channel.noise.cohort if channel.noise else clients
    flat, start, found = real(total, channel.grid) / over, 0, {}
    for key in sorted(shared.shapes):
        size = int(np.prod(shared.shapes[key], dtype=np.int64))
        there = flat[start : start + size].reshape(shared.shapes[key])
        found[key] = (sides[key].back(there) if key in sides else there).astype(np.float32)
        start += size
    return found


def coordinates(channel: Channel, spec: AdapterSpec, tensors: Tensors, shared: AdapterSpec) -> dict[str, Sides]:
    """The coordinates of what clients send: those of products where noise is added, else the numbers themselves."""
    return geometry(spec, tensors, shared.shapes) if channel.noise else {}
