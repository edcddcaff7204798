"""What a private run does that others do not: who is drawn, what is merged, and what a round costs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from fedpeft.merges import Merge
from fedpeft.privacy.entropy import SOURCES
from fedpeft.privacy.samplers import SAMPLERS, Population
from fedpeft.stages import Stage, identity
from fedpeft.updates import ServerState, Spent

CLIENT, EXAMPLE = "client", "example"
"""What is protected: all that one client has, or one example of it."""


@dataclass(frozen=True)
class Mechanism:
    """A way to protect, as the strategy, the laws and the account see it.

    `wrap(merge)` is the merge that takes the place of the rule's; `stage` is what clients do to their updates. `sums`
    says that the mechanism bounds a plain sum of updates, each weighing the same, so only rules that are such a sum go
    with it. `unit` is what is protected, `expense` what one round costs, or None where the account is not the server's
    to keep. `turns` says that tensors may take turns, one set trained in odd rounds and another in even ones.
    """

    unit: str
    expense: Spent | None
    population: Population
    entropy: str = "os"
    wrap: Callable[[Merge], Merge] = field(default=lambda merge: merge)
    stage: Stage = field(default_factory=identity)
    sums: bool = False
    turns: bool = True

    def drawn(self, state: ServerState) -> tuple[int, ...] | None:
        """The partitions of the round after `state`; None where those take part that would anyway."""
        sampler = SAMPLERS[self.expense.sampler].draw if self.expense else None
        if sampler is None:
            return None
        round_ = state.round + 1
        return sampler(self.population, round_, SOURCES[self.entropy](state.seed, round_, "cohort"))

    def charge(self, round_: int) -> Spent | None:
        """What round `round_` costs; None where the account is not the server's."""
        return self.expense and Spent(**{**vars(self.expense), "round": round_})
