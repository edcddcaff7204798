"""In plain words: what a run protected, from whom, with which unit, sampler, ε and δ, and what it did not."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from fedpeft.report.history import History, Record

_IN_CLEAR = (
    "Not protected: what each client says beside its update (its loss and other figures, how many examples and tokens "
    "it trained on), who took part in which round, and how long each took. The server has all that, and so has whoever "
    "reads this page or the journal."
)

_DRAWN = {
    "poisson": "each client was drawn by a coin of its own in every round, and two federations are neighbours that "
    "differ in one client being there",
    "fixed": "a fixed number of clients was drawn in every round, and two federations are neighbours that differ in "
    "who one of the clients is",
    "everyone": "every client was in every round, so no draw is counted, and two federations are neighbours that "
    "differ in one client being there",
    "reachable": "whoever could be reached took part, so no draw is counted, and two federations are neighbours that "
    "differ in one client being there",
}

_SEEDED = (
    "This is an experiment and protects nobody: noise and draws came from the run's seed, so whoever knows the seed "
    "can take the noise away again."
)

_SECRET_DRAWS = (
    "The draw counts only as long as nobody learns who was drawn: the journal and this page say it, so they are for "
    "the server's operator."
)


def protection_words(run: History) -> tuple[str, ...]:
    """Sentences about what the run protected, from its journal."""
    mechanism, sums = str(run.config.get("privacy.mechanism") or "none"), in_sums(run.config)
    words = _IN_SUMS.get(mechanism) if sums else None
    return (words or _WORDS.get(mechanism, _unknown))(run.config, _spent(run))


def protected_by(config: Record) -> str:
    """In a few words: what a run of these settings protects with."""
    mechanism = str(config.get("privacy.mechanism") or "none")
    noise = config.get(f"privacy.{mechanism}.noise_multiplier")
    told = [f"{mechanism} noise of {noise:g}"] if isinstance(noise, float | int) else []
    return " and ".join([*told, *(["secure sums"] if in_sums(config) else [])]) or "nothing"


def in_sums(config: Record) -> bool:
    """Whether the server of a run of these settings was told sums of updates alone."""
    return config.get("federation.channel.kind") == "secure"


def spent_by(run: History) -> float | None:
    """The ε of the run so far; infinite where noise was lacking, None where nothing was promised."""
    return _spent(run) if any("epsilon" in record for record in run.rounds) else None


def _spent(run: History) -> float:
    found = [record["epsilon"] for record in run.rounds if "epsilon" in record]
    if not found:
        return 0.0
    return math.inf if found[-1] is None else float(found[-1])


def _none(config: Record, spent: float) -> tuple[str, ...]:  # noqa: ARG001
    clipped = config.get("aggregation.stages.clip_norm")
    bound = f" Clipping updates to a norm of {clipped:g} bounds one site's pull and hides nothing." if clipped else ""
    return (
        "Rows never left their sites. Nothing else was protected: the server saw every update, and updates and "
        f"adapters can give away what they were trained on.{bound}",
        _IN_CLEAR,
    )


def _summed(config: Record, spent: float) -> tuple[str, ...]:  # noqa: ARG001
    return (
        "Rows never left their sites. No ε is promised: sums of updates and adapters can give away what they were "
        "trained on.",
        *_sums(config),
        _IN_CLEAR,
    )


def _central_in_sums(config: Record, spent: float) -> tuple[str, ...]:
    clip = config.get("privacy.central.clip_norm", math.nan)
    return (
        "Protected: all that one client has (the unit is a client), from everyone who sees the sums or the adapter, "
        "after any round or all of them; from the server too, as far as its sums go. Clients added the noise.",
        f"{_promise(config, 'central', spent)}: {_DRAWN['reachable']}. Each update was clipped to a norm of {clip:g} "
        "and rounded, and each client added its share of discrete Gaussian noise: together that of those who must "
        f"stay is {_noise(config, 'central')} times that norm.",
        *_sums(config),
        _IN_CLEAR,
    )


def _sums(config: Record) -> tuple[str, ...]:
    """What secure sums hide of the updates in them, and from which server."""
    least = config.get("federation.channel.secure.least_cohort", 3)
    colluding = float(config.get("federation.channel.secure.colluding") or 0.0)
    signed = (
        "Messages were signed by the nodes' own keys: for nodes that know their peers that holds even of a server "
        f"that does not keep to the protocol, with up to {colluding:.0%} of the clients on its side."
        if config.get("federation.channel.secure.signed")
        else "Messages were not signed: a server that does not keep to the protocol could have played all other "
        "clients against one and read that one's update."
    )
    return (
        "Protected: each client's update, from a server that keeps to the protocol. It saw sums of the updates of "
        f"{least} clients or more and no update alone.",
        *_IN_TWO.get(str(config.get("aggregation.merge.rule")), ()),
        signed,
    )


def _central(config: Record, spent: float) -> tuple[str, ...]:
    sampler = str(config.get("privacy.central.sampler", "poisson"))
    clip = "that followed the clients' own norms" if config.get("privacy.central.adaptive") else "of"
    norm = "" if config.get("privacy.central.adaptive") else f" {config.get('privacy.central.clip_norm', math.nan):g}"
    drawn = (_SECRET_DRAWS,) if sampler in ("poisson", "fixed") else ()
    return (
        *((_SEEDED,) if config.get("privacy.central.entropy") == "seed" else ()),
        "Protected: all that one client has (the unit is a client), from everyone who sees the adapter, after any "
        "round or all of them. Not from the server, which saw each update before it added noise.",
        f"{_promise(config, 'central', spent)}: {_DRAWN.get(sampler, sampler)}. Each update was clipped to a norm "
        f"{clip}{norm}, and the sum got Gaussian noise of {_noise(config, 'central')} times that.",
        *drawn,
        _IN_CLEAR,
    )


def _local(config: Record, spent: float) -> tuple[str, ...]:
    return (
        "Protected: all that one client has (the unit is a client), from everyone, the server too: each client added "
        "noise to its own update before sending it.",
        f"{_promise(config, 'local', spent)}, for a client that took part in every round: no draw is counted, and any "
        "two states of its rows are neighbours. Each update was clipped to a norm of "
        f"{config.get('privacy.local.clip_norm', math.nan):g} and got Gaussian noise of {_noise(config, 'local')} "
        "times that.",
        *(_sums(config) if in_sums(config) else ()),
        _IN_CLEAR,
    )


def _example(config: Record, spent: float) -> tuple[str, ...]:
    drawn = "each example was drawn by a coin of its own in every step"
    if config.get("privacy.example.sampler", "poisson") != "poisson":
        drawn = "any example may have been in every step, so no draw is counted"
    return (
        *((_SEEDED,) if config.get("privacy.example.entropy") == "seed" else ()),
        "Protected: each single example of a client (the unit is an example), from everyone, the server too: clients "
        "clipped and blurred every step of their training. Not protected is what many examples of a client share.",
        f"{_promise(config, 'example', spent)}, for a site of {config.get('privacy.example.rows')} rows or more that "
        f"took part in every round: {drawn}. Gradients were clipped to a norm of "
        f"{config.get('privacy.example.clip_norm', math.nan):g} each, and a step's sum got Gaussian noise of "
        f"{_noise(config, 'example')} times that.",
        *(_sums(config) if in_sums(config) else ()),
        _IN_CLEAR,
    )


def _unknown(config: Record, spent: float) -> tuple[str, ...]:  # noqa: ARG001
    return (f"This page cannot tell what the mechanism {config.get('privacy.mechanism')} protects.", _IN_CLEAR)


def _promise(config: Record, name: str, spent: float) -> str:
    delta = config.get(f"privacy.{name}.delta")
    told = "ε has no bound" if math.isinf(spent) else f"ε = {spent:.3g}"
    return f"{told} at δ = {delta:.2g}" if isinstance(delta, float) else told


def _noise(config: Record, name: str) -> str:
    return f"{config.get(f'privacy.{name}.noise_multiplier', math.nan):g}"


_IN_TWO: Mapping[str, tuple[str, ...]] = {
    "flexlora": (
        "Of what adapters do it saw two sums in a round, over the same clients: of random sketches, and of products as "
        "far as they lie in the space of the first. Clients open no second sum without all clients of the first.",
    )
}
"""What to say of rules that need more than one sum."""

_WORDS: Mapping[str, Callable[[Record, float], tuple[str, ...]]] = {
    "none": _none,
    "central": _central,
    "local": _local,
    "example": _example,
}
"""What to say of a mechanism, by its name."""

_IN_SUMS: Mapping[str, Callable[[Record, float], tuple[str, ...]]] = {"none": _summed, "central": _central_in_sums}
"""What to say instead where secure sums change what the mechanism protects."""
