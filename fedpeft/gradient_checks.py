"""Which way to the gradients of single examples is right for a model and a task: each is tried before it is used."""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice

import torch
from torch import nn

from fedpeft.errors import FedPeftError
from fedpeft.evaluation import autocast
from fedpeft.example_gradients import WAYS, Taken, Way, batch_of, losses_of, one_at_a_time, refusal
from fedpeft.models import AdaptedModel
from fedpeft.tasks import Encoded, Task

_CLOSE = (1e-3, 1e-5)
"""How far a tensor's gradient may be from the right one: a share of its own norm, and one of the whole gradient's."""

_CLOSE_IN_FEWER_BITS = (5e-2, 1e-3)
"""The same, where the model does not compute in float32."""

_MOVED = 0.05
"""The standard deviation of what trained numbers are moved by for a check: some begin at zero and hide others."""

_FOUND: weakref.WeakKeyDictionary[nn.Module, dict[tuple[str, ...], str]] = weakref.WeakKeyDictionary()
"""What was found for the models of this process, so that it is sought and said once."""

_logger = logging.getLogger(__name__)


def way_for(
    adapted: AdaptedModel, task: Task, parameters: Mapping[str, nn.Parameter], examples: Sequence[Encoded]
) -> Way:
    """The first of `WAYS` that gives the right gradients on up to three of `examples`, of unlike size.

    It is sought once for a model, a task and a set of parameters, and said in the log. The model computes what it did
    before, and torch's generators stand where they stood.

    Raises:
        PlanError: an example has no gradient of its own here.
    """
    known = _FOUND.setdefault(adapted.model, {})
    about = (task.metric, getattr(task.losses, "__qualname__", ""), *parameters)
    if about not in known:
        known[about] = name = sought(adapted, task, list(parameters.values()), unlike(examples))
        _logger.info("the gradients of single examples are taken %s", name)
    return WAYS[known[about]]


def unlike(examples: Sequence[Encoded]) -> list[Encoded]:
    """The longest, a middling and the shortest example, no two the same; fewer where there are no more."""
    ordered = sorted(examples, key=lambda example: -example.size)
    found: list[Encoded] = []
    for at in (0, len(ordered) // 2, len(ordered) - 1):
        another = (example for example in [*ordered[at:], *ordered[:at]] if example not in found)
        found += islice(another, 1)
    return found


def sought(
    adapted: AdaptedModel,
    task: Task,
    parameters: Sequence[nn.Parameter],
    examples: Sequence[Encoded],
    ways: Mapping[str, Way] = WAYS,
) -> str:
    """The name of the first of `ways` that is right on `examples`; the last, one at a time, is so by definition.

    They are compared in training, or where that draws at random (dropout), in evaluation.

    Raises:
        PlanError: an example has no gradient of its own here.
    """
    *fast, last = ways
    with _moved(adapted.model, parameters):
        adapted.model.train()
        _require_own_gradients(adapted, task, parameters, examples[0])
        adapted.model.train(_repeats(adapted, task, examples[:1]))
        right = one_at_a_time(adapted, task, parameters, examples)
        if len(examples) > 1:
            for name in fast:
                if _is_right(ways[name], adapted, task, parameters, examples, right):
                    return name
    return last


def _is_right(
    way: Way,
    adapted: AdaptedModel,
    task: Task,
    parameters: Sequence[nn.Parameter],
    examples: Sequence[Encoded],
    right: Taken,
) -> bool:
    mode = adapted.model.training
    try:
        if not same(way(adapted, task, parameters, examples), right, adapted.precision):
            return False
        if not mode:  # it has to run with all that training draws at random, too
            adapted.model.train()
            way(adapted, task, parameters, examples)
    except FedPeftError:
        raise
    except Exception as error:  # a layer may refuse in any words to compute in a way that it was not written for
        _logger.debug("a way to the gradients of single examples is left out: %s", type(error).__name__)
        return False
    finally:
        adapted.model.train(mode)
    return True


def same(found: Taken, right: Taken, precision: torch.dtype) -> bool:
    """Whether every tensor's gradient of each example is the right one but for rounding."""
    of_own, of_whole = _CLOSE if precision == torch.float32 else _CLOSE_IN_FEWER_BITS
    count = len(right.losses)
    wanted = [one.reshape(count, -1).double() for one in right.gradients]
    whole = torch.stack([one.norm(dim=1) for one in wanted]).norm(dim=0)
    if any(len(one) != count for one in found.gradients):
        return False
    return all(
        bool(((one.reshape(count, -1) - other).norm(dim=1) <= of_own * other.norm(dim=1) + of_whole * whole).all())
        for one, other in zip(found.gradients, wanted, strict=True)
    )


def _require_own_gradients(
    adapted: AdaptedModel, task: Task, parameters: Sequence[nn.Parameter], example: Encoded
) -> None:
    """Raises PlanError if an example alone has no gradient, or leaves a trace in the model that another would meet."""
    before = {name: buffer.clone() for name, buffer in adapted.model.named_buffers()}
    try:
        one_at_a_time(adapted, task, parameters, [example])
        _require_one_loss(adapted, task, example)
    except FedPeftError:
        raise
    except Exception as error:
        said = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise refusal("a loss of one example alone", said, "choose another base or task") from error
    finally:
        moved = [name for name, buffer in adapted.model.named_buffers() if not torch.equal(buffer, before[name])]
        for name in moved:
            adapted.model.get_buffer(name).copy_(before[name])
    if moved:
        raise refusal(
            "a base that keeps nothing of what it has read",
            f"one that does, in {moved[0]}, as batch normalisation would",
            "choose one with layer normalisation",
        )


def _require_one_loss(adapted: AdaptedModel, task: Task, example: Encoded) -> None:
    """Raises PlanError if the loss of a batch of one is not the one that the task tells of its example."""
    mode = adapted.model.training
    adapted.model.eval()
    with torch.no_grad(), autocast(adapted):
        batch = batch_of(adapted, task, [example])
        loss, own = float(task.loss(adapted.model, batch)), float(losses_of(task, adapted.model, batch, 1))
    adapted.model.train(mode)
    if abs(loss - own) > 1e-3 * abs(loss) + 1e-6:
        raise refusal(
            "a task whose loss of one example is the one that it lowers",
            f"{own:.4g} beside {loss:.4g}",
            "let its `losses` be those whose mean its `loss` is",
        )


def _repeats(adapted: AdaptedModel, task: Task, examples: Sequence[Encoded]) -> bool:
    """Whether the model gives the same losses again, whatever torch's generator draws."""
    found = []
    with torch.no_grad(), autocast(adapted):
        for seed in range(3):
            torch.manual_seed(seed)
            found.append(losses_of(task, adapted.model, batch_of(adapted, task, examples), len(examples)))
    return all(torch.equal(one, found[0]) for one in found)


@contextlib.contextmanager
def _moved(model: nn.Module, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Inside, what is trained is a little off, and torch's generators are free to use; after it all is as it was."""
    mode, before = model.training, [one.detach().clone() for one in parameters]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        try:
            with torch.no_grad():
                for one in parameters:
                    one.add_(_MOVED * torch.randn_like(one))
            yield
        finally:
            model.train(mode)
            with torch.no_grad():
                for one, value in zip(parameters, before, strict=True):
                    one.copy_(value)
