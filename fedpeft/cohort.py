"""Local training of several clients in one forward and backward pass over the base that they share.

Their batches stand one below the other, and each client's rows meet its own adapter. The clients' numbers are apart
from each other in the sum of their losses, so its gradients are each client's own; clipping, the optimiser's state, the
schedule and the order of examples are each client's own too. What comes out is what each would have come to alone, but
for the rounding of sums. Adapters of a lower rank are padded with zeros, which have no gradient and stay zero.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from fedpeft.adapters import AdapterState
from fedpeft.batches import batches_from
from fedpeft.client import FitJob, Fitted
from fedpeft.cohort_layers import Way
from fedpeft.cohort_pass import Part, losses_of_parts, passes
from fedpeft.coordinates import put
from fedpeft.corrections import Pull, pull_of
from fedpeft.errors import FedPeftError
from fedpeft.evaluation import autocast, padding
from fedpeft.models import AdaptedModel, extract, install, trained
from fedpeft.randomness import derive_seed
from fedpeft.tasks import Encoded
from fedpeft.training import TorchLearner, learning_rate_factor, mean_loss, rate_groups

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
        **_habits(adapted.model),
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


def most_tokens_of_a_batch(learner: TorchLearner) -> int:
    """How many tokens a batch of the learner's longest examples has."""
    return learner.settings.batch_size * max(map(_tokens, learner.examples))


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


def gradients(members: Sequence[Member], most_tokens: int, way: Way, by: float) -> tuple[list[torch.Tensor], ...]:
    """Those of each parameter at the members' first batches, `(members, *shape)`: all together, and one by one.

    They are taken a little off the start, by a standard deviation of `by`, because some numbers begin at zero and hide
    others. Padding stays zero.
    """
    adapted = members[0].learner.adapted
    with torch.random.fork_rng():
        runs, stacks = _begun(members)
        torch.manual_seed(0)
        for key, stack in stacks.items():
            for at, run in enumerate(runs if stack.requires_grad else ()):
                corner = stack.data[at][_corner(run.shapes[key])]
                corner += by * torch.randn_like(corner)
        batches = [next(run.batches) for run in runs]
        adapted.model.train()
        _add_gradients(adapted, runs, batches, stacks, 1, most_tokens, way)
        one_by_one = {key: torch.zeros_like(stack) for key, stack in stacks.items() if stack.requires_grad}
        for at, (run, batch) in enumerate(zip(runs, batches, strict=True)):
            _put(adapted, run, at, stacks)
            own = {key: parameter for key, parameter in trained(adapted).items() if key in one_by_one}
            found = _alone(run.member, batch, list(own.values()))
            for key, gradient in zip(own, found, strict=True):
                if gradient is not None:
                    one_by_one[key][at][_corner(gradient.shape)] = gradient
        learned = [stacks[key] for key in one_by_one]
        cohort = [torch.zeros_like(one) if one.grad is None else one.grad for one in learned]
        return cohort, list(one_by_one.values())


def _alone(member: Member, batch: list[Encoded], parameters: list[nn.Parameter]) -> tuple[torch.Tensor | None, ...]:
    """The gradients of one member's batch as the model holds its numbers; no graph is left, which would bind ranks."""
    adapted, task = member.learner.adapted, member.learner.task
    torch.manual_seed(_seed(member))
    with autocast(adapted):
        loss = task.loss(adapted.model, task.collate(batch, padding(adapted), adapted.device))
        total = loss if adapted.penalty is None else loss + adapted.penalty()
    return torch.autograd.grad(total, parameters, allow_unused=True)


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
        torch.manual_seed(_seed(member))
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
    """Adds the gradients of one micro-batch of every member, and what they saw."""
    batches = [next(run.batches) for run in runs]
    losses = _add_gradients(adapted, runs, batches, stacks, accumulation, most, way)
    for run, batch, loss in zip(runs, batches, losses, strict=True):
        run.losses.append(loss)
        run.examples += len(batch)
        run.tokens += sum(example.size for example in batch)


def _add_gradients(
    adapted: AdaptedModel,
    runs: Sequence[_Run],
    batches: Sequence[list[Encoded]],
    stacks: Mapping[str, nn.Parameter],
    accumulation: int,
    most: int,
    way: Way,
) -> list[torch.Tensor]:
    """Adds the gradients of every member's batch; their losses."""
    found: dict[int, torch.Tensor] = {}
    for at in passes([(len(batch), max(map(_tokens, batch))) for batch in batches], most):
        index = torch.tensor(at, device=adapted.device)
        own = stacks if at == list(range(len(runs))) else {key: stack[index] for key, stack in stacks.items()}
        parts = [Part(batches[i], runs[i].stream) for i in at]
        losses = losses_of_parts(adapted, runs[0].member.learner.task, parts, own, way)
        for i, part in zip(at, parts, strict=True):
            runs[i].stream = part.stream
        total = torch.stack(losses).sum()
        if adapted.penalty is not None:
            _add_penalties(adapted, [(i, runs[i]) for i in at], stacks, accumulation)
        torch.autograd.backward(total / accumulation)
        found |= {i: loss.detach() for i, loss in zip(at, losses, strict=True)}
    return [found[i] for i in range(len(runs))]


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


def _seed(member: Member) -> int:
    return derive_seed(member.learner.seed, member.job.round, member.job.partition, "dropout")


def _corner(shape: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(size) for size in shape)


def _tokens(example: Encoded) -> int:
    return example.size if example.size > 1 else _IMAGE_TOKENS


def _is_made(adapted: AdaptedModel, key: str) -> bool:
    """Whether a tensor is made by an encoder, which keeps where it began and so is the same for all of a cohort."""
    path = key.rpartition(".")[0]
    return any(module.path == path and module.kind == "encoded" for module in adapted.spec.modules)


_HABITS: weakref.WeakKeyDictionary[nn.Module, dict[str, bool]] = weakref.WeakKeyDictionary()
"""What was found of the models of this process: each is shared by many learners, and has hundreds of modules."""


def _habits(model: nn.Module) -> dict[str, bool]:
    """Which of the things that no cohort can have the model does, by what is said of it; looked for once."""
    if model not in _HABITS:
        norms = (isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
        _HABITS[model] = {
            "the base leaves out numbers at random": _drops(model),
            "the base keeps statistics of batches": any(norms),
        }
    return _HABITS[model]


def _drops(model: nn.Module) -> bool:
    """Whether the model leaves out numbers at random in training."""
    rates = (getattr(module, name, 0.0) for module in model.modules() for name in _RATES)
    return any(isinstance(rate, float) and rate > 0 for rate in rates)


_RATES = ("p", "dropout", "attention_dropout", "dropout_p", "attn_dropout", "dropout_prob")
"""What modules call the share that they leave out."""
