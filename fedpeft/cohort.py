"""Local training of several clients in one forward and backward pass over the base that they share.

Their batches stand one below the other, and each client's rows meet its own adapter. The clients' numbers are apart
from each other in the sum of their losses, so its gradients are each client's own; clipping, the optimiser's state, the
schedule and the order of examples are each client's own too. What comes out is what each would have come to alone, but
for the rounding of sums. Adapters of a lower rank are padded with zeros, which have no gradient and stay zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from fedpeft.adapters import AdapterState
from fedpeft.batches import batches_from
from fedpeft.client import FitJob, Fitted
from fedpeft.cohort_layers import Way, side_by_side
from fedpeft.coordinates import put
from fedpeft.corrections import Pull, pull_of
from fedpeft.errors import FedPeftError
from fedpeft.evaluation import autocast, padding
from fedpeft.models import AdaptedModel, extract, install, trained
from fedpeft.randomness import derive_seed
from fedpeft.tasks import Encoded
from fedpeft.training import TorchLearner, learning_rate_factor, mean_loss, rate_groups

_LEAST_FULL = 0.6
"""The least share of a pass's rows, and of its tokens, that a client has to fill, where a pass is large."""

_SMALL_TOKENS = 512
"""Passes of no more tokens are not split for the sake of padding."""

_IMAGE_TOKENS = 256
"""What an image, whose size is said to be 1, counts for."""


@dataclass(frozen=True)
class Member:
    """One of the clients that train together: its learner, the adapter that it starts from, and what it is to do."""

    learner: TorchLearner
    adapter: AdapterState
    job: FitJob


@dataclass
class _Run:
    """A member on its way: its batches, the state of its own random stream, and what it has seen."""

    member: Member
    batches: Iterator[list[Encoded]]
    stream: torch.Tensor
    before: Mapping[str, np.ndarray]
    shapes: Mapping[str, torch.Size]
    pull: Pull | None = None
    examples: int = 0
    tokens: int = 0
    losses: list[torch.Tensor] = field(default_factory=list)


def unserved(learner: TorchLearner) -> str:
    """Why this learner has to train alone; empty where it can train together with others."""
    adapted = learner.adapted
    reasons = {
        "examples are protected one by one": learner.private is not None,
        f"the task {learner.task.metric!r} makes several passes, or packs texts": learner.task.copies != 1
        or learner.task.losses is None,
        "precision float16 scales each client's loss by its own history": adapted.precision == torch.float16,
        "the base leaves out numbers at random": _drops(adapted.model),
        "the base keeps statistics of batches": any(
            isinstance(module, nn.modules.batchnorm._BatchNorm) for module in adapted.model.modules()
        ),
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


def together(one: Member, other: Member) -> bool:
    """Whether two members can be in one cohort: of one model and one plan, with the same tensors held still."""
    return (
        one.learner.adapted is other.learner.adapted
        and one.learner.settings == other.learner.settings
        and (one.learner.seed, one.learner.rounds) == (other.learner.seed, other.learner.rounds)
        and (one.job.round, one.job.frozen) == (other.job.round, other.job.frozen)
        and one.adapter.residual.keys() == other.adapter.residual.keys()
        and all(np.array_equal(value, other.adapter.residual[key]) for key, value in one.adapter.residual.items())
        and all(
            np.array_equal(value, other.adapter.tensors[key])
            for key, value in one.adapter.tensors.items()
            if _is_made(one.learner.adapted, key)
        )
    )


def fit_cohort(members: Sequence[Member], most_tokens: int, way: Way) -> list[Fitted | FedPeftError]:
    """What `training.fit` gives for each of `members`, or what it raises; `together` holds for any two of them.

    At most `most_tokens` tokens of several clients go through the model at once. Nothing may be drawn by the model
    itself at random: see `unserved`.
    """
    first = members[0].learner
    adapted, settings = first.adapted, first.settings
    with torch.random.fork_rng():
        runs, stacks = _begun(members)
        parameters = {key: stack for key, stack in stacks.items() if stack.requires_grad}
        optimizer = torch.optim.AdamW(rate_groups(parameters, first), weight_decay=settings.weight_decay)
        pulls = [_pull_of(run, at, parameters, settings.proximal) for at, run in enumerate(runs)]
        for run, (pull, _) in zip(runs, pulls, strict=True):
            run.pull = pull
        first_step = (members[0].job.round - 1) * settings.steps
        adapted.model.train()
        for step in range(first_step, first_step + settings.steps):
            rate = learning_rate_factor(settings, step, first.rounds * settings.steps)
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * rate
            for _ in range(settings.accumulation):
                _accumulate(adapted, runs, stacks, settings.accumulation, most_tokens, way)
            _add_terms(pulls, parameters)
            if settings.max_gradient_norm:
                _clip_each(list(parameters.values()), settings.max_gradient_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return [_finished(run, at, stacks, settings.learning_rate * rate) for at, run in enumerate(runs)]


def _begun(members: Sequence[Member]) -> tuple[list[_Run], dict[str, nn.Parameter]]:
    """The members at their start, and for each parameter of the adapter their values, `(members, *widest shape)`."""
    adapted = members[0].learner.adapted
    learned = trained(adapted, members[0].job.frozen)
    runs: list[_Run] = []
    values: list[dict[str, torch.Tensor]] = []
    for member in members:
        install(adapted, member.adapter)
        own = {key: parameter.detach().clone() for key, parameter in trained(adapted).items()}
        learner, job = member.learner, member.job
        torch.manual_seed(derive_seed(learner.seed, job.round, job.partition, "dropout"))
        batch_size = learner.settings.batch_size
        runs.append(
            _Run(
                member,
                batches_from(learner.examples, batch_size, learner.seed, job.partition, job.position),
                torch.get_rng_state(),
                extract(adapted).tensors,
                {key: value.shape for key, value in own.items()},
            )
        )
        values.append(own)
    stacks = {}
    for key in values[0]:
        each = [own[key] for own in values]
        widest = tuple(max(sizes) for sizes in zip(*(value.shape for value in each), strict=True))
        stack = each[0].new_zeros((len(members), *widest))
        for at, value in enumerate(each):
            stack[at][_corner(value.shape)] = value
        stacks[key] = nn.Parameter(stack, requires_grad=key in learned)
    return runs, stacks


def _accumulate(
    adapted: AdaptedModel,
    runs: Sequence[_Run],
    stacks: Mapping[str, nn.Parameter],
    accumulation: int,
    most: int,
    way: Way,
) -> None:
    """Adds the gradients of one micro-batch of every member."""
    batches = [next(run.batches) for run in runs]
    for at in passes([(len(batch), max(map(_tokens, batch))) for batch in batches], most):
        index = torch.tensor(at, device=adapted.device)
        own = stacks if at == list(range(len(runs))) else {key: stack[index] for key, stack in stacks.items()}
        losses = _losses(adapted, [runs[i] for i in at], [batches[i] for i in at], own, way)
        total = torch.stack(losses).sum()
        if adapted.penalty is not None:
            _add_penalties(adapted, [(i, runs[i]) for i in at], stacks, accumulation)
        torch.autograd.backward(total / accumulation)
        for i, loss in zip(at, losses, strict=True):
            runs[i].losses.append(loss.detach())
            runs[i].examples += len(batches[i])
            runs[i].tokens += sum(example.size for example in batches[i])


def passes(sizes: Sequence[tuple[int, int]], most: int) -> list[list[int]]:
    """Which clients go through the model together, by number, from the (rows, longest row) that each brings.

    Those of like length do; a pass holds at most `most` tokens, padding counted, or one client.
    """
    found: list[list[int]] = []
    order = sorted(range(len(sizes)), key=lambda at: (-sizes[at][1], -sizes[at][0], at))
    rows = width = 0
    for at in order:
        own_rows, own_width = sizes[at]
        tallest = max(rows, own_rows)
        padded = tallest * width * (len(found[-1]) + 1) if found else math.inf
        full = own_rows >= _LEAST_FULL * rows and own_width >= _LEAST_FULL * width
        if padded <= most and (full or padded <= _SMALL_TOKENS):
            found[-1].append(at)
            rows = tallest
        else:
            found.append([at])
            rows, width = own_rows, own_width
    return [sorted(each) for each in found]


def _losses(
    adapted: AdaptedModel,
    runs: Sequence[_Run],
    batches: Sequence[list[Encoded]],
    own: Mapping[str, torch.Tensor],
    way: Way,
) -> list[torch.Tensor]:
    """The loss of each member's batch, all from one pass of the model."""
    task = runs[0].member.learner.task
    rows = max(len(batch) for batch in batches)
    whole = task.collate([example for batch in batches for example in batch], padding(adapted), adapted.device)
    ends = np.cumsum([0, *(len(batch) for batch in batches)]).tolist()
    slices = [{key: value[a:b] for key, value in whole.items()} for a, b in zip(ends, ends[1:], strict=False)]
    model: Any = adapted.model
    with autocast(adapted):
        asked = [_asked(run, model, task.loss, batch) for run, batch in zip(runs, slices, strict=True)]
        by_id = {id(parameter): own[key] for key, parameter in trained(adapted).items()}
        with side_by_side(model, by_id, rows, way):
            answer = model(**_below(asked, rows))
        return [
            task.loss(_Answering(model, answer, slice(at * rows, at * rows + len(batch))), part)  # type: ignore[arg-type]
            for at, (batch, part) in enumerate(zip(batches, slices, strict=True))
        ]


class _Reached(Exception):  # noqa: N818
    """The task has asked the model."""


@dataclass(frozen=True)
class _Asking:
    """Stands for the model, and notes what the task asks of it."""

    model: Any
    asked: dict[str, Any]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def __call__(self, **kwargs: Any) -> Any:
        self.asked.update(kwargs)
        raise _Reached


@dataclass(frozen=True)
class _Answering:
    """Stands for the model, and answers a task with its own rows of what the model said."""

    model: Any
    answer: Any
    rows: slice

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def __call__(self, **kwargs: Any) -> Any:
        del kwargs
        return _Rows(self.answer, self.rows)


@dataclass(frozen=True)
class _Rows:
    """Some rows of what a model said."""

    answer: Any
    rows: slice

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.answer, name)
        return value[self.rows] if isinstance(value, torch.Tensor) else value


def _asked(
    run: _Run, model: nn.Module, loss: Callable[..., torch.Tensor], batch: Mapping[str, torch.Tensor]
) -> dict[str, Any]:
    """What the task asks of the model for this member's batch; what it draws comes from the member's own stream."""
    asking = _Asking(model, {})
    torch.set_rng_state(run.stream)
    try:
        loss(asking, batch)
    except _Reached:
        pass
    run.stream = torch.get_rng_state()
    return asking.asked


def _below(asked: Sequence[Mapping[str, Any]], rows: int) -> dict[str, Any]:
    """The arguments of all members, `rows` rows of each one below the other; the last row is repeated where one lacks."""
    found: dict[str, Any] = {}
    for key, value in asked[0].items():
        each = [one[key] for one in asked]
        if isinstance(value, torch.Tensor):
            found[key] = torch.cat([torch.cat([one, one[-1:].expand(rows - len(one), *one.shape[1:])]) for one in each])
        else:
            found[key] = value
    return found


def _add_penalties(
    adapted: AdaptedModel, runs: Sequence[tuple[int, _Run]], stacks: Mapping[str, nn.Parameter], accumulation: int
) -> None:
    """Adds the gradients of what the family puts on each member's numbers."""
    if adapted.penalty is None:
        return
    for at, run in runs:
        _put(adapted, run, at, stacks)
        own = {key: parameter for key, parameter in trained(adapted).items() if stacks[key].requires_grad}
        found = torch.autograd.grad(adapted.penalty() / accumulation, list(own.values()), allow_unused=True)
        for key, gradient in zip(own, found, strict=True):
            if gradient is not None:
                stack = stacks[key]
                stack.grad = torch.zeros_like(stack) if stack.grad is None else stack.grad
                stack.grad[at][_corner(gradient.shape)] += gradient


def _clip_each(stacks: Sequence[nn.Parameter], most: float) -> None:
    """Each member's gradient has a norm of at most `most`, as `torch.nn.utils.clip_grad_norm_` does it for one."""
    gradients = [stack.grad for stack in stacks if stack.grad is not None]
    norms = torch.stack([torch.linalg.vector_norm(one.flatten(1), dim=1) for one in gradients])
    factors = (most / (torch.linalg.vector_norm(norms, dim=0) + 1e-6)).clamp(max=1.0)
    for one in gradients:
        one.mul_(factors.view(-1, *[1] * (one.ndim - 1)))


def _pull_of(
    run: _Run, at: int, parameters: Mapping[str, nn.Parameter], proximal: float
) -> tuple[Pull, dict[str, nn.Parameter]]:
    """The terms that a federation adds to this member's gradients, and the views of its numbers that they work on."""
    job = run.member.job
    if not (job.correction or proximal or job.pruning):
        return Pull((), {}), {}
    own = {key: nn.Parameter(stack.detach()[at][_corner(run.shapes[key])]) for key, stack in parameters.items()}
    return pull_of(own, proximal, job), own


def _add_terms(
    pulls: Sequence[tuple[Pull, Mapping[str, nn.Parameter]]], parameters: Mapping[str, nn.Parameter]
) -> None:
    for at, (pull, own) in enumerate(pulls):
        for key, view in own.items():
            stack = parameters[key]
            if stack.grad is None and key in pull.gradients:
                stack.grad = torch.zeros_like(stack)
            view.grad = None if stack.grad is None else stack.grad[at][_corner(view.shape)]
        for add_term in pull.terms:
            add_term()


def _finished(run: _Run, at: int, stacks: Mapping[str, nn.Parameter], rate: float) -> Fitted | FedPeftError:
    learner, job = run.member.learner, run.member.job
    settings, pull = learner.settings, run.pull or Pull((), {})
    try:
        loss = mean_loss(run.losses, job)
    except FedPeftError as error:
        return error
    install(learner.adapted, run.member.adapter)
    _put(learner.adapted, run, at, stacks)
    return Fitted(
        before=run.before,
        after=extract(learner.adapted).tensors,
        examples=run.examples,
        tokens=run.tokens,
        position=job.position + settings.steps * settings.accumulation,
        metrics={"loss": loss, "learning_rate": rate},
        gradients={key: np.array(total.cpu().numpy() / settings.steps) for key, total in pull.gradients.items()},
    )


def _put(adapted: AdaptedModel, run: _Run, at: int, stacks: Mapping[str, nn.Parameter]) -> None:
    """The model holds this member's numbers, at its own ranks."""
    with torch.no_grad():
        for key, parameter in trained(adapted).items():
            put(parameter, stacks[key].detach()[at][_corner(run.shapes[key])].clone())


def _corner(shape: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(size) for size in shape)


def _tokens(example: Encoded) -> int:
    return example.size if example.size > 1 else _IMAGE_TOKENS


def _is_made(adapted: AdaptedModel, key: str) -> bool:
    """Whether a tensor is made by an encoder, which keeps where it began and so is the same for all of a cohort."""
    path = key.rpartition(".")[0]
    return any(module.path == path and module.kind == "encoded" for module in adapted.spec.modules)


def _drops(model: nn.Module) -> bool:
    """Whether the model leaves out numbers at random in training."""
    rates = (getattr(module, name, 0.0) for module in model.modules() for name in _RATES)
    return any(isinstance(rate, float) and rate > 0 for rate in rates)


_RATES = ("p", "dropout", "attention_dropout", "dropout_p", "attn_dropout", "dropout_prob")
"""What modules call the share that they leave out."""
