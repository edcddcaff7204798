"""Settings of who takes part, and at which rank."""

from __future__ import annotations

from dataclasses import dataclass, field

from fedpeft.config.fields import Choice, Table, choice, require, require_range
from fedpeft.privacy import Channel


@dataclass(frozen=True)
class PlainChannel:
    """The server sees every update."""

    def build(self) -> Channel | None:
        """No channel of its own."""
        return None


@dataclass(frozen=True)
class SecureChannel:
    """The server sees the sum of updates and none of them: secure aggregation.

    An update is clipped to `clip_norm` and sent as integers of `bits` bits. A sum is of `least_cohort` clients at
    least, `dropout` of whom may fall silent, and `colluding` of whom may be in league with a hostile server. Where
    messages are `signed`, every node must name its `peers`, and no server can pass for one of them.
    """

    clip_norm: float = 10.0
    bits: int = 24
    least_cohort: int = 3
    dropout: float = 0.3
    colluding: float = 0.0
    signed: bool = False

    def __post_init__(self) -> None:
        require(self.clip_norm > 0, "clip_norm", expected="a number above 0", found=self.clip_norm)
        require_range(self, "bits", 8, 32)
        require_range(self, "least_cohort", 2)
        require_range(self, "dropout", 0.0, 0.49)
        require_range(self, "colluding", 0.0, 0.49)

    def build(self) -> Channel:
        """The channel that these settings describe."""
        return Channel(self.clip_norm, self.bits, self.least_cohort, self.dropout, self.colluding, signed=self.signed)


CHANNELS = Table("kind", {"plain": PlainChannel, "secure": SecureChannel})


@dataclass(frozen=True)
class Equal:
    """Every node trains at the adapter's own rank."""


@dataclass(frozen=True)
class Listed:
    """Partition p trains at the p-th of `ranks`, counted round and round."""

    ranks: tuple[int, ...] = (2, 4, 8, 16)

    def __post_init__(self) -> None:
        require(bool(self.ranks) and min(self.ranks) >= 1, "ranks", expected="ranks of 1 or more", found=self.ranks)


@dataclass(frozen=True)
class Declared:
    """Every node says its own rank before each round, which costs one more exchange; `default` for one that doesn't.

    A node says it with `rank=4` in its `--node-config`.
    """

    default: int = 4

    def __post_init__(self) -> None:
        require_range(self, "default", 1)


@dataclass(frozen=True)
class ByMemory:
    """A node says how much memory it has and trains at the last of `ranks` whose `gigabytes` it has."""

    ranks: tuple[int, ...] = (2, 4, 8, 16)
    gigabytes: tuple[float, ...] = (1.0, 4.0, 8.0, 16.0)

    def __post_init__(self) -> None:
        require(bool(self.ranks) and min(self.ranks) >= 1, "ranks", expected="ranks of 1 or more", found=self.ranks)
        require(
            len(self.gigabytes) == len(self.ranks) and list(self.gigabytes) == sorted(self.gigabytes),
            "gigabytes",
            expected=f"{len(self.ranks)} numbers in rising order, one for each rank",
            found=self.gigabytes,
        )


RANKS = Table("rule", {"equal": Equal, "listed": Listed, "declared": Declared, "by_memory": ByMemory})


@dataclass(frozen=True)
class FailuresConfig:
    """How much a site may fail before it is not asked for a while.

    Where the failures of the last `window` rounds weigh `budget` or more (0: no site is ever barred), the site is
    barred for `rest` rounds, the second time for twice as many, and so on. An answer that is refused weighs 1, a
    failure that the site admits 0.5, and no answer at all nothing.
    """

    budget: int = 3
    window: int = 10
    rest: int = 20

    def __post_init__(self) -> None:
        require_range(self, "budget", 0, 10_000)
        require_range(self, "window", 1, 10_000)
        require_range(self, "rest", 1, 100_000)


@dataclass(frozen=True)
class FederationConfig:
    """Who takes part: `cohort` of `clients` sites each round.

    A round needs `quorum` usable updates (0: all of the cohort) within `deadline_seconds`; where there are fewer, those
    that have not answered are asked again, up to `retries` times. `spare` sites more than the cohort are asked, and the
    first `cohort` to answer are taken. A round waits `wait_seconds` for all whom it would ask to be connected, and
    up to the deadline for as many as the quorum. What comes after a round is over is dropped, or with `late = "carry"`
    taken into the next, at a weight of 1/√2. An update whose norm is above `most_update_norm` (0: no bound) is refused,
    and so is one that claims more than `most_examples` (0: no bound), because what a site says of its rows weighs its
    update and cannot be checked. `failures` says when a site that keeps failing is not asked for a while.
    `ranks` says which rank each site trains at.
    """

    clients: int = 12
    cohort: int = 6
    quorum: int = 1
    spare: int = 0
    deadline_seconds: float = 600.0
    retries: int = 0
    wait_seconds: float = 0.0
    late: str = "drop"
    most_update_norm: float = 0.0
    most_examples: int = 0
    ranks: Choice = choice(RANKS, "equal")
    channel: Choice = choice(CHANNELS, "plain")
    failures: FailuresConfig = field(default_factory=FailuresConfig)

    def __post_init__(self) -> None:
        require_range(self, "clients", 1)
        require_range(self, "cohort", 1)
        require(
            self.cohort <= self.clients,
            "cohort",
            expected=f"at most clients = {self.clients}",
            found=self.cohort,
            remedy="lower cohort or raise clients",
        )
        require_range(self, "quorum", 0, self.cohort)
        require_range(self, "spare", 0, self.clients - self.cohort)
        require_range(self, "retries", 0, 100)
        require_range(self, "wait_seconds", 0.0)
        require(self.late in ("drop", "carry"), "late", expected="drop or carry", found=self.late)
        require(self.deadline_seconds > 0, "deadline_seconds", expected="above 0", found=self.deadline_seconds)
        require_range(self, "most_update_norm", 0.0)
        require_range(self, "most_examples", 0, 10**9)
