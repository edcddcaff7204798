"""Settings of what a run protects, and how."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from fedpeft.config.fields import Choice, Table, choose, require, require_range
from fedpeft.errors import PlanError, sentence
from fedpeft.privacy import (
    CLIENT,
    EXAMPLE,
    SOURCES,
    Adaptive,
    Central,
    Channel,
    ClientNoise,
    Mechanism,
    Population,
    calibrated,
    count_noise,
    noisy,
    private,
    square_root,
    update_noise,
)
from fedpeft.privacy.examples import EXAMPLE_SAMPLERS, POISSON, ExamplePrivacy, sampling_rate
from fedpeft.updates import Spent


@dataclass(frozen=True)
class NoPrivacy:
    """Nothing is protected but by what stays where it is."""

    def build(self, population: Population) -> Mechanism | None:  # noqa: ARG002
        """No mechanism."""
        return None


@dataclass(frozen=True)
class Promise:
    """What every mechanism has: a bound on one client's reach, and ε, δ or the noise itself.

    `clip_norm` bounds what one client's update may do. With `noise_multiplier` 0 the noise is what `epsilon` needs over
    all rounds; where both are given, the run stops before it would exceed `epsilon` (0: no budget). `delta` 0 means
    N^(−1.1) of N clients.
    """

    clip_norm: float = 0.1
    epsilon: float = 0.0
    delta: float = 0.0
    noise_multiplier: float = 0.0

    def __post_init__(self) -> None:
        require(
            self.clip_norm > 0,
            "clip_norm",
            expected="a number above 0, because with 0 nothing is left of any update",
            found=self.clip_norm,
        )
        require_range(self, "epsilon", 0.0)
        require_range(self, "delta", 0.0, 1.0)
        require_range(self, "noise_multiplier", 0.0)

    def expense(self, population: Population) -> Spent:
        """What a round costs, its noise as these settings have it."""
        raise NotImplementedError

    def crowd(self, population: Population) -> int:
        """Among how many the one is hidden that is protected."""
        return max(population.clients, 2)

    def filled(self, population: Population) -> Promise:
        """These settings with what they leave open."""
        return replace(self, delta=self.delta or self.crowd(population) ** -1.1)


@dataclass(frozen=True)
class CentralPrivacy(Promise):
    """The server adds noise to the mean; every client trusts it, and all that leaves it is protected.

    `sampler` is who takes part: `poisson` (each client by a coin of its own), `fixed` (so many), `everyone`, or
    `reachable` (whoever is there, which amplifies nothing). With `adaptive` the clipping norm follows the `quantile` of
    the clients' norms, at `clip_rate`, with noise of `count_noise` on their count (0: as much as does no harm). With
    `bands` above 1 noise is taken back in later rounds and clients take turns in as many groups. `entropy` is `os`, or
    `seed` for experiments that must repeat to the bit, which protects nobody who knows the seed.
    """

    sampler: str = "poisson"
    adaptive: bool = False
    quantile: float = 0.5
    clip_rate: float = 0.2
    count_noise: float = 0.0
    bands: int = 1
    entropy: str = "os"

    def __post_init__(self) -> None:
        super().__post_init__()
        drawn = ("poisson", "fixed", "everyone", "reachable")
        require(self.sampler in drawn, "sampler", expected=f"one of {', '.join(drawn)}", found=self.sampler)
        require(self.entropy in SOURCES, "entropy", expected=f"one of {', '.join(SOURCES)}", found=self.entropy)
        require(0 < self.quantile < 1, "quantile", expected="a number between 0 and 1", found=self.quantile)
        require(self.clip_rate > 0, "clip_rate", expected="a number above 0", found=self.clip_rate)
        require_range(self, "count_noise", 0.0)
        require_range(self, "bands", 1)
        turns = self.bands == 1 or self.sampler == "poisson"
        require(turns, "sampler", expected="poisson, by which bands are accounted", found=self.sampler)
        alone = self.bands == 1 or not self.adaptive
        require(alone, "adaptive", expected="false with bands above 1, whose noise needs one scale", found=True)

    def expense(self, population: Population) -> Spent:
        """What a round costs."""
        turns = replace(population, groups=self.bands)
        return Spent(0, self.sampler, turns.clients, turns.rate, self.noise_multiplier, turns.groups)

    def build(self, population: Population) -> Mechanism:
        """The mechanism for such a population."""
        follows = Adaptive(self.quantile, self.clip_rate, self.count_noise) if self.adaptive else None
        central = Central(
            self.clip_norm, self.noise_multiplier, population.cohort, follows, square_root(self.bands), self.entropy
        )
        turns = replace(population, groups=self.bands)
        return Mechanism(
            CLIENT,
            self.expense(population),
            turns,
            self.entropy,
            wrap=lambda merge: private(merge, central),
            sums=True,
            turns=self.bands == 1,
        )


@dataclass(frozen=True)
class LocalPrivacy(Promise):
    """Every client adds noise to its own update, so that not even the server sees more."""

    def expense(self, population: Population) -> Spent:  # noqa: ARG002
        """What a round costs a client that takes part."""
        return Spent(0, "own", 1, 1.0, self.noise_multiplier)

    def build(self, population: Population) -> Mechanism:
        """The mechanism for such a population."""
        stage = noisy(self.clip_norm, self.noise_multiplier)
        return Mechanism(CLIENT, self.expense(population), population, stage=stage)


@dataclass(frozen=True)
class ExampleLevel(Promise):
    """Each client protects every one of its own examples while it trains: DP-SGD.

    `clip_norm` bounds the gradient of an example. `sampler` is `poisson` (each example by a coin of its own in every
    step) or `shuffled`, which amplifies nothing. The promise is made for sites of `rows` rows (0: of the smallest that
    the settings deal out) and no node with fewer takes part. `delta` 0 means n^(−1.1) of so many rows.
    """

    clip_norm: float = 1.0
    rows: int = 0
    sampler: str = POISSON
    entropy: str = "os"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_range(self, "rows", 0)
        known = ", ".join(EXAMPLE_SAMPLERS)
        require(self.sampler in EXAMPLE_SAMPLERS, "sampler", expected=f"one of {known}", found=self.sampler)
        require(self.entropy in SOURCES, "entropy", expected=f"one of {', '.join(SOURCES)}", found=self.entropy)

    def crowd(self, population: Population) -> int:
        """The rows of the smallest site."""
        return max(self.rows or population.rows, 2)

    def filled(self, population: Population) -> ExampleLevel:
        """These settings with the rows of the smallest site and δ."""
        rows = self.crowd(population)
        return replace(self, rows=rows, delta=self.delta or rows**-1.1)

    def expense(self, population: Population) -> Spent:
        """What a round costs a site of so many rows that takes part."""
        rows = self.crowd(population)
        drawn = self.sampler == POISSON
        rate = sampling_rate(rows, population.batch) if drawn else 1.0
        name = "examples" if drawn else "shuffled"
        return Spent(0, name, rows, rate, self.noise_multiplier, steps=population.steps)

    def build(self, population: Population) -> Mechanism:
        """The mechanism for such a population."""
        return Mechanism(EXAMPLE, self.expense(population), population, self.entropy)

    def training(self) -> ExamplePrivacy:
        """What a client does in its training."""
        return ExamplePrivacy(self.clip_norm, self.noise_multiplier, self.sampler, self.entropy)


PRIVACY = Table(
    "mechanism",
    {"none": NoPrivacy, "central": CentralPrivacy, "local": LocalPrivacy, "example": ExampleLevel},
)


def in_sums(
    privacy: Choice, population: Population, channel: Channel | None
) -> tuple[Mechanism | None, Channel | None]:
    """The mechanism and the channel of a run; where a server cannot see what it should add noise to, clients do.

    Raises:
        PlanError: the mechanism asks for more than sums with such noise can give.
    """
    chosen = privacy.chosen
    if channel is None or not isinstance(chosen, CentralPrivacy):
        return chosen.build(population), channel
    for key, wanted, found in (
        ("sampler", "reachable, because no amplification is known of noise in sums", chosen.sampler),
        ("adaptive", "false, because a sum has no room for the count of short updates", chosen.adaptive),
        ("bands", "1, because noise in sums cannot be taken back", chosen.bands),
    ):
        if found not in _IN_SUMS[key]:
            raise PlanError(
                sentence(
                    f"privacy.central.{key}",
                    expected=wanted,
                    found=found,
                    remedy=f"set privacy.central.{key}={_IN_SUMS[key][0]}".lower(),
                )
            )
    noise = ClientNoise(chosen.noise_multiplier, population.cohort)
    spent = replace(chosen.expense(population), sampler="summed")
    return Mechanism(CLIENT, spent, population, chosen.entropy), replace(
        channel, clip_norm=chosen.clip_norm, noise=noise
    )


_IN_SUMS: Mapping[str, tuple[object, ...]] = {"sampler": ("reachable",), "adaptive": (False,), "bands": (1,)}
"""What settings must be where clients add the noise."""


def settled(privacy: Choice, population: Population, rounds: int, *, sums: bool = False) -> Choice:
    """`privacy` with the noise that its ε needs, where the settings leave that open; in `sums` clients add it.

    Raises:
        PlanError: nothing is promised, δ is too great to mean anything, or no noise keeps the promise.
    """
    settings = privacy.chosen
    if not isinstance(settings, Promise):
        return privacy
    settings, place = settings.filled(population), f"privacy.{privacy.name}"
    if settings.delta > 1.0 / settings.crowd(population):
        raise PlanError(
            sentence(
                f"{place}.delta",
                expected=f"at most 1/{settings.crowd(population)}, since a mechanism that shows one whole has that",
                found=f"{settings.delta:g}",
                remedy="lower it, or leave it 0",
            )
        )
    if not settings.epsilon and not settings.noise_multiplier:
        raise PlanError(
            sentence(
                place,
                expected="epsilon or noise_multiplier above 0",
                found="neither",
                remedy=f"set {place}.epsilon=8, or privacy.mechanism=none",
            )
        )
    if not settings.noise_multiplier:
        expense = settings.expense(population)
        central = sums and isinstance(settings, CentralPrivacy)
        expense = replace(expense, sampler="summed") if central else expense
        noise = calibrated(expense, rounds, settings.epsilon, settings.delta)
        settings = replace(settings, noise_multiplier=noise)
    _require_count(settings, population, place)
    return choose(privacy.table, privacy.name, **{privacy.name: settings})


def _require_count(settings: Promise, population: Population, place: str) -> None:
    if not isinstance(settings, CentralPrivacy) or not settings.adaptive:
        return
    follows = Adaptive(noise=settings.count_noise)
    on_count = count_noise(follows, settings.noise_multiplier, population.cohort)
    if update_noise(settings.noise_multiplier, on_count) == float("inf"):
        raise PlanError(
            sentence(
                f"{place}.count_noise",
                expected=f"above {settings.noise_multiplier / 2:g}, half the noise multiplier",
                found=settings.count_noise,
                remedy="raise it, or leave it 0",
            )
        )
