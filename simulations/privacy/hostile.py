"""Hostile clients: what they send in place of what they trained.

Attackers know one another, what they were sent, and what everybody else sends in the round: the strongest that the
papers assume. Each attack is a pure function of that; `hostile` puts it between the server and the nodes. What they
send is encoded as an honest answer is, and has to pass every check of the server.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from scipy import stats

from fedpeft.adapters import AdapterState, Tensors, at_rank, low_rank_modules, norm
from fedpeft.randomness import rng
from fedpeft.strategy import Strategy, sent
from fedpeft.updates import ServerState, Update
from fedpeft.wire import Failure, Packet, Transport, fit_reply, read_update
from simulations.privacy.recording import Between, Replies

_LEAST_DEVIATIONS = 1.0

_SESSION = ("version", "run", "config", "spec", "round")


class Situation(NamedTuple):
    """A round as attackers see it: what they received, what their own clients trained, and what the others send."""

    received: AdapterState
    own: tuple[Update, ...]
    honest: tuple[Update, ...]
    random: np.random.Generator

    @property
    def clients(self) -> int:
        """All that answer in this round."""
        return len(self.own) + len(self.honest)


Forge = Callable[[Situation], tuple[Update, ...]]
"""What each of the attackers sends."""


def as_trained(situation: Situation) -> tuple[Update, ...]:
    """What was trained, on whatever rows: label flip, or nothing at all."""
    return situation.own


def sign_flip(scale: float = 3.0) -> Forge:
    """The opposite of what was trained, `scale` times as long.

    Source: Li et al. 2019, "RSA: Byzantine-Robust Stochastic Aggregation Methods", section 5.
    """
    return lambda situation: tuple(_times(one, -scale) for one in situation.own)


def gaussian(scale: float = 3.0) -> Forge:
    """Noise, `scale` times as long as an honest update. Source: Blanchard et al. 2017, section 5."""

    def forge(situation: Situation) -> tuple[Update, ...]:
        length = scale * _usual_norm(situation)
        noises = [_like(one, situation.random) for one in situation.own]
        return tuple(_times(noise, length / norm(noise.delta)) for noise in noises)

    return forge


def replacement(situation: Situation) -> tuple[Update, ...]:
    """What was trained, so long that a mean becomes it.

    Source: Bagdasaryan et al. 2020, "How To Backdoor Federated Learning", eq. 3, shared among the attackers.
    """
    return tuple(_times(one, situation.clients / len(situation.own)) for one in situation.own)


def norm_matched(situation: Situation) -> tuple[Update, ...]:
    """What was trained, as long as honest updates are, so that no bound on norms sees it.

    Source: Sun et al. 2019, "Can You Really Backdoor Federated Learning?", section 3.
    """
    length = _usual_norm(situation)
    return tuple(_times(one, length / max(norm(one.delta), 1e-30)) for one in situation.own)


def little_is_enough(situation: Situation) -> tuple[Update, ...]:
    """The mean of honest updates less so many deviations, number by number, that enough of them are farther out.

    Source: ALIE, Baruch et al. 2019, "A Little Is Enough: Circumventing Defenses For Distributed Learning",
    algorithm 3. Of few clients, a small part of them hostile, that many is none; then it is one deviation.
    """
    clients, attackers = situation.clients, len(situation.own)
    supporters = clients // 2 + 1 - attackers
    share = (clients - attackers - supporters) / (clients - attackers)
    z = max(_LEAST_DEVIATIONS, float(stats.norm.ppf(min(max(share, 0.5), 0.999))))
    keys = situation.own[0].delta
    stacks = {key: np.stack([one.delta[key] for one in situation.honest]) for key in keys}
    delta = {key: (stack.mean(0) - z * stack.std(0)).astype(np.float32) for key, stack in stacks.items()}
    return tuple(replace(one, delta=delta) for one in situation.own)


def inner_product(scale: float = 1.0) -> Forge:
    """The opposite of the mean of honest updates, `scale` times as long.

    Source: IPM, Xie et al. 2020, "Fall of Empires: Breaking Byzantine-tolerant SGD by Inner Product Manipulation",
    eq. 3.
    """

    def forge(situation: Situation) -> tuple[Update, ...]:
        keys = situation.own[0].delta
        delta = {
            key: (-scale * np.mean([one.delta[key] for one in situation.honest], axis=0)).astype(np.float32)
            for key in keys
        }
        return tuple(replace(one, delta=delta) for one in situation.own)

    return forge


def gauge(scale: float) -> Forge:
    """What was trained, with A `scale` times as long and B as much shorter: the same product from other factors.

    The adapter that results does what an honest one does, so nothing that looks at what adapters do can object; but it
    does not add up with others, factor by factor. `scale` a little above 1, round after round, is a slow drift.
    """

    def forge(situation: Situation) -> tuple[Update, ...]:
        return tuple(replace(one, delta=_regauged(one, situation.received, scale)) for one in situation.own)

    return forge


@dataclass(frozen=True)
class Hostile:
    """An attack: what the attackers' rows are made of (`flipped`, `triggered`, or honest), and what they send."""

    forge: Forge
    rows: str = ""


ATTACKS: Mapping[str, Hostile] = {
    "none": Hostile(as_trained),
    "sign_flip": Hostile(sign_flip()),
    "gaussian": Hostile(gaussian()),
    "label_flip": Hostile(as_trained, "flipped"),
    "replacement": Hostile(replacement, "triggered"),
    "norm_matched": Hostile(norm_matched, "triggered"),
    "alie": Hostile(little_is_enough),
    "ipm": Hostile(inner_product()),
    "gauge_inflation": Hostile(gauge(30.0)),
    "gauge_drift": Hostile(gauge(1.2)),
}
"""Every attack by name; `none` is what costs are measured against."""


def hostile(
    inner: Transport,
    strategy: Strategy,
    attackers: Collection[int],
    forge: Forge,
    state: Callable[[], ServerState],
    heard: Callable[[ServerState, Mapping[int, Update]], None] = lambda now, updates: None,  # noqa: ARG005
) -> Transport:
    """`inner`, whose `attackers` send what `forge` makes; `state` is the server's now, `heard` is told of a round.

    Replies are held until all are in, because attackers look at those of the others.
    """

    def pass_on(requests: Mapping[int, Packet], replies: Replies) -> Replies:
        came, now = dict(replies), state()
        updates = _updates(strategy, now, requests, came)
        own = [partition for partition in sorted(updates) if partition in attackers]
        if own and len(own) < len(updates):
            others = tuple(one for partition, one in sorted(updates.items()) if partition not in attackers)
            spec = at_rank(now.adapter.spec, int(requests[own[0]].manifest.get("rank", 0)))
            random = rng(now.seed, now.round + 1, "hostile")
            situation = Situation(sent(now.adapter, spec), tuple(updates[at] for at in own), others, random)
            for partition, forged in zip(own, forge(situation), strict=True):
                updates[partition] = forged
                came[partition] = _reply(strategy, forged, requests[partition], partition, came[partition])
        if updates:
            heard(now, updates)
        yield from came.items()

    return Between(inner, pass_on)


def _updates(
    strategy: Strategy, state: ServerState, requests: Mapping[int, Packet], came: Mapping[int, Packet | Failure]
) -> dict[int, Update]:
    """The updates among the replies."""
    found = {}
    for partition, reply in came.items():
        if isinstance(reply, Packet) and reply.kind == "update" and requests[partition].kind == "fit":
            manifest = requests[partition].manifest
            spec = at_rank(state.adapter.spec, int(manifest.get("rank", 0)))
            expected = {**{key: manifest[key] for key in _SESSION}, "partition": partition}
            found[partition] = read_update(reply, strategy, spec, expected)
    return found


def _reply(strategy: Strategy, update: Update, request: Packet, partition: int, honest: Packet | Failure) -> Packet:
    manifest = {**{key: request.manifest[key] for key in _SESSION}, "partition": partition}
    rank = int(honest.manifest.get("rank", 0)) if isinstance(honest, Packet) else 0
    return fit_reply(strategy, update, manifest, rank)


def _regauged(update: Update, received: AdapterState, scale: float) -> Tensors:
    delta, by = dict(update.delta), {"A": scale, "B": 1 / scale}
    for module in low_rank_modules(update.spec):
        for name, factor in by.items():
            key = f"{module.path}.{name}"
            after = received.tensors[key] + update.delta[key]
            delta[key] = (np.float32(factor) * after - received.tensors[key]).astype(np.float32)
    return delta


def _times(update: Update, factor: float) -> Update:
    return replace(update, delta={key: (factor * value).astype(np.float32) for key, value in update.delta.items()})


def _like(update: Update, random: np.random.Generator) -> Update:
    noise = {key: random.standard_normal(value.shape).astype(np.float32) for key, value in update.delta.items()}
    return replace(update, delta=noise)


def _usual_norm(situation: Situation) -> float:
    """The median norm of what honest clients send."""
    return float(np.median([norm(one.delta) for one in situation.honest])) if situation.honest else math.nan
