"""What an adversary sees of a run, apart from what is true of it.

An attack is a function of one view and of what anybody knows (`Public`). No view and nothing public holds a row of a
site: what an attack found is judged afterwards, by the rows that the federation really had.
"""

from __future__ import annotations

from dataclasses import dataclass

from fedpeft.adapters import AdapterState, Tensors, fit
from fedpeft.config.training import TrainingConfig
from fedpeft.data.rows import Row
from fedpeft.models import AdaptedModel
from fedpeft.tasks import Task


@dataclass(frozen=True)
class ClientDelta:
    """One client's answer, as the server has it once it is decoded: an honest but curious server.

    `received` is the adapter that the client was sent, at its rank; `examples` and `tokens` are what the client says
    that it trained on.
    """

    partition: int
    round: int
    received: AdapterState
    delta: Tensors
    examples: int
    tokens: int

    @property
    def adapter(self) -> AdapterState:
        """The client's own adapter, as far as it travelled."""
        before = self.received.tensors
        moved = {key: before[key] + fit(value, before[key].shape) for key, value in self.delta.items()}
        return AdapterState(self.received.spec, {**before, **moved}, self.received.residual)


@dataclass(frozen=True)
class Aggregate:
    """What one round did to the server's adapter: a client, which is sent both, or a server that sees sums alone."""

    round: int
    before: AdapterState
    after: AdapterState

    @property
    def adapter(self) -> AdapterState:
        """The adapter after the round."""
        return self.after

    @property
    def delta(self) -> Tensors:
        """After less before, of tensors whose shape stayed."""
        pairs = ((key, self.before.tensors[key], value) for key, value in self.after.tensors.items())
        return {key: now - then for key, then, now in pairs if now.shape == then.shape}


@dataclass(frozen=True)
class FinalAdapter:
    """What is deployed: anybody who has the released files."""

    adapter: AdapterState


View = ClientDelta | Aggregate | FinalAdapter


@dataclass(frozen=True)
class Public:
    """What every adversary knows: the base with the adapter as it was drawn, the task, how clients train, and `rows`.

    The rows are of the kind that clients have, and nobody's in the federation.
    """

    adapted: AdaptedModel
    task: Task
    training: TrainingConfig
    rows: tuple[Row, ...] = ()
