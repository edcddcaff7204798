"""Local training of an adapter on one site's examples."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from fedpeft.adapters import AdapterSpec, AdapterState
from fedpeft.client import FitJob, Fitted, Learner
from fedpeft.config.training import TrainingConfig
from fedpeft.errors import FederationError, sentence
from fedpeft.evaluation import autocast, evaluate, padding
from fedpeft.merges import Pruning
from fedpeft.models import AdaptedModel, extract, install, trained
from fedpeft.pruning import kept_rank
from fedpeft.randomness import derive_seed, rng
from fedpeft.tasks import Encoded, Task

LIBRARY_BYTES = 500_000_000
"""Bytes that Python, torch and transformers take before a model is loaded, as measured on Linux."""

_TINY = 1e-12
"""The least norm that a gradient is divided by."""

_WINDOW_BATCHES = 8
"""Examples of like size are sought within this many batches of the shuffled rows."""


@dataclass(frozen=True)
class TorchLearner:
    """A site's model, task and examples; implements `fedpeft.client.Learner`.

    `rounds` is the length of the run, over which the learning rate is scheduled. The model may be shared by
    the learners of one process: each fit and each evaluation first installs the adapter that it is given.
    """

    adapted: AdaptedModel
    task: Task
    examples: tuple[Encoded, ...]
    settings: TrainingConfig
    seed: int
    rounds: int
    evaluation_batch_size: int

    @property
    def spec(self) -> AdapterSpec:
        """The specification of the adapter that this learner trains."""
        return self.adapted.spec

    def fit(self, adapter: AdapterState, job: FitJob) -> Fitted:
        """Trains from `adapter` for the settings' number of steps.

        Raises:
            FederationError: the loss is not finite.
        """
        return fit(self, adapter, job)

    def evaluate(self, adapter: AdapterState) -> Mapping[str, float]:
        """Figures of `adapter` on all of this site's examples."""
        install(self.adapted, adapter)
        found = evaluate(self.adapted, self.task, self.examples, self.evaluation_batch_size)
        return {key: value for key, value in found.items() if key != "groups"}


@dataclass
class _Seen:
    """Sums over the micro-batches of one fit."""

    examples: int = 0
    tokens: int = 0
    losses: list[torch.Tensor] = field(default_factory=list)


def fit(learner: TorchLearner, adapter: AdapterState, job: FitJob) -> Fitted:
    """AdamW on the adapter for `settings.steps` steps; the base does not move.

    Source: FedProx (Li et al. 2020, "Federated Optimization in Heterogeneous Networks", eq. 2) where
    `settings.proximal` is above 0, as a gradient term beside AdamW; SCAFFOLD (Karimireddy et al. 2020, eq. 3) where
    `job.correction` is given. The control variate that comes back is the mean of the gradients before correction:
    under SGD that is the paper's option II, c − c_i + (x − y_i)/(K η), and under AdamW it stays a mean of gradients.
    """
    settings, adapted = learner.settings, learner.adapted
    install(adapted, adapter)
    before = extract(adapted).tensors
    parameters = trained(adapted, job.frozen)
    optimizer = torch.optim.AdamW(_groups(parameters, learner), weight_decay=settings.weight_decay)
    scaler = torch.amp.GradScaler(adapted.device.type, enabled=adapted.precision == torch.float16)
    pull = _pull(parameters, learner, job)
    batches = batches_from(learner.examples, settings.batch_size, learner.seed, job.partition, job.position)
    seen = _Seen()
    first_step = (job.round - 1) * settings.steps
    adapted.model.train()
    with _without(adapted, job.frozen), _randomness(learner.seed, job):
        for step in range(first_step, first_step + settings.steps):
            rate = learning_rate_factor(settings, step, learner.rounds * settings.steps)
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * rate
            _accumulate(learner, batches, scaler, seen)
            _finish_step(list(parameters.values()), pull, optimizer, scaler, settings)
    return Fitted(
        before=before,
        after=extract(adapted).tensors,
        examples=seen.examples,
        tokens=seen.tokens,
        position=job.position + settings.steps * settings.accumulation,
        metrics={"loss": _mean_loss(seen, job), "learning_rate": settings.learning_rate * rate},
        gradients={key: np.array(total.cpu().numpy() / settings.steps) for key, total in pull.gradients.items()},
    )


@dataclass(frozen=True)
class _Pull:
    """What is added to the gradients of a step, and the sums of the gradients before it, by tensor."""

    terms: tuple[Callable[[], None], ...]
    gradients: Mapping[str, torch.Tensor]


def _pull(parameters: Mapping[str, nn.Parameter], learner: TorchLearner, job: FitJob) -> _Pull:
    """The terms that a federation adds to a client's own gradients; each adds to `.grad` in place."""
    terms: list[Callable[[], None]] = []
    sums = {key: torch.zeros_like(parameters[key]) for key in job.correction if key in parameters}
    if sums:
        corrections = {key: torch.from_numpy(job.correction[key]).to(sums[key]) for key in sums}
        terms.append(lambda: _correct(parameters, corrections, sums))
    if learner.settings.proximal:
        anchors = {key: parameter.detach().clone() for key, parameter in parameters.items()}
        terms.append(lambda: _attract(parameters, anchors, learner.settings.proximal))
    if job.pruning:
        terms.append(lambda: _shrink_tails(parameters, job.pruning))
    return _Pull(tuple(terms), sums)


def _correct(
    parameters: Mapping[str, nn.Parameter], corrections: Mapping[str, torch.Tensor], sums: Mapping[str, torch.Tensor]
) -> None:
    for key, total in sums.items():
        gradient = parameters[key].grad
        if gradient is None:
            parameters[key].grad = corrections[key].clone()
        else:
            total.add_(gradient)
            gradient.add_(corrections[key])


def _attract(parameters: Mapping[str, nn.Parameter], anchors: Mapping[str, torch.Tensor], strength: float) -> None:
    for key, anchor in anchors.items():
        gradient = parameters[key].grad
        if gradient is not None:
            gradient.add_(parameters[key].detach() - anchor, alpha=strength)


def _shrink_tails(parameters: Mapping[str, nn.Parameter], pruning: Pruning | None) -> None:
    """Adds the gradient of penalty × Σ ‖B[:, kept:]‖ ‖A[kept:]‖; the gradient of a norm at zero is taken as zero."""
    for key, a in parameters.items():
        b = parameters.get(f"{key.removesuffix('.A')}.B")
        if pruning is None or b is None or not key.endswith(".A") or a.grad is None or b.grad is None:
            continue
        kept = kept_rank(a.shape[0], pruning)
        rows, columns = a.detach()[kept:], b.detach()[:, kept:]
        size_a, size_b = rows.norm(), columns.norm()
        a.grad[kept:] += pruning.penalty * size_b * rows / size_a.clamp_min(_TINY)
        b.grad[:, kept:] += pruning.penalty * size_a * columns / size_b.clamp_min(_TINY)


def fit_memory_bytes(learner: TorchLearner) -> int:
    """Bytes that training adds to the base.

    They are the adapter, its gradient and AdamW's two moments, and what one batch of the learner's largest
    examples keeps for the backward pass (measured, by a forward pass of such a batch).
    """
    adapted = learner.adapted
    longest = sorted(learner.examples, key=lambda example: -example.size)[: learner.settings.batch_size]
    batch = learner.task.collate(longest, padding(adapted), adapted.device)
    weights = {parameter.untyped_storage().data_ptr() for parameter in adapted.model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.layout is not torch.strided:  # a sparse tensor has no storage of its own
            kept[id(tensor)] = tensor.element_size() * tensor._nnz()
            return tensor.detach()
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # the tensor itself would keep the graph, and so its shapes, alive

    adapted.model.train()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast(adapted):
        loss = learner.task.loss(adapted.model, batch)
    del loss
    return 16 * adapted.spec.parameters + sum(kept.values())


def training_memory_bytes(learner: Learner) -> int:
    """Bytes of memory that this machine has for training: its GPU's where the model is on one, else its own."""
    device = learner.adapted.device if isinstance(learner, TorchLearner) else torch.device("cpu")
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def learning_rate_factor(settings: TrainingConfig, step: int, steps: int) -> float:
    """The learning rate over its peak at `step` (from 0) of `steps`: linear warm-up, then half a cosine.

    Source: Loshchilov and Hutter 2017, "SGDR", eq. 5, without restarts, over the steps of the whole run.
    """
    warmup = round(settings.warmup_fraction * steps)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - 1 - warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return settings.final_fraction + (1 - settings.final_fraction) * cosine


def batches_from(
    examples: Sequence[Encoded], batch_size: int, seed: int, partition: int, position: int
) -> Iterator[list[Encoded]]:
    """Batches without end, from the one numbered `position` on.

    Every epoch goes through all examples in a new order; a batch holds examples of like size.
    """
    per_epoch = math.ceil(len(examples) / batch_size)
    epoch, skipped = divmod(position, per_epoch)
    while True:
        for batch in _epoch(examples, batch_size, rng(seed, partition, epoch, "batches"))[skipped:]:
            yield [examples[i] for i in batch]
        epoch, skipped = epoch + 1, 0


def _epoch(examples: Sequence[Encoded], batch_size: int, random: np.random.Generator) -> list[np.ndarray]:
    order = random.permutation(len(examples))
    lengths = np.array([examples[i].size for i in order])
    window = _WINDOW_BATCHES * batch_size
    starts = range(0, len(order), window)
    order = np.concatenate([order[s : s + window][np.argsort(lengths[s : s + window], kind="stable")] for s in starts])
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    return [batches[i] for i in random.permutation(len(batches))]


def _accumulate(
    learner: TorchLearner, batches: Iterator[list[Encoded]], scaler: torch.amp.GradScaler, seen: _Seen
) -> None:
    """Adds the gradients of one optimiser step, the mean over its micro-batches."""
    adapted, accumulation = learner.adapted, learner.settings.accumulation
    for _ in range(accumulation):
        examples = next(batches)
        batch = learner.task.collate(examples, padding(adapted), adapted.device)
        with autocast(adapted):
            loss = learner.task.loss(adapted.model, batch)
            penalised = loss if adapted.penalty is None else loss + adapted.penalty()
        torch.autograd.backward(scaler.scale(penalised / accumulation))
        seen.examples += len(examples)
        seen.tokens += sum(example.size for example in examples)
        seen.losses.append(loss.detach())


def _finish_step(
    parameters: Sequence[nn.Parameter],
    pull: _Pull,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    settings: TrainingConfig,
) -> None:
    scaler.unscale_(optimizer)
    for add_term in pull.terms:
        add_term()
    if settings.max_gradient_norm:
        torch.nn.utils.clip_grad_norm_(parameters, settings.max_gradient_norm)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)


def _mean_loss(seen: _Seen, job: FitJob) -> float:
    losses = torch.stack(seen.losses).double().cpu().numpy()
    if not np.isfinite(losses).all():
        raise FederationError(
            sentence(
                f"training, round {job.round}, partition {job.partition}",
                expected="a finite loss",
                found=f"{losses[~np.isfinite(losses)][0]}",
                remedy="lower training.learning_rate",
            )
        )
    return float(losses.mean())


def _groups(parameters: Mapping[str, nn.Parameter], learner: TorchLearner) -> list[dict[str, Any]]:
    """Parameter groups by peak rate: of the adapter, of tensors trained whole (the head), and of those told otherwise.

    Source: LoRA+, Hayou et al. 2024, section 4, where the family has rates of its own.
    """
    settings, rates = learner.settings, learner.adapted.family.rates
    whole = {
        f"{module.path}.{name}" for module in learner.spec.modules if module.kind == "full" for name, _ in module.shapes
    }
    head_rate = settings.head_learning_rate or settings.learning_rate
    groups: dict[float, list[nn.Parameter]] = {}
    for key, parameter in parameters.items():
        own = settings.learning_rate * rates.get(key.rpartition(".")[2], 1.0)
        groups.setdefault(head_rate if key in whole else own, []).append(parameter)
    return [{"params": found, "lr": rate, "peak": rate} for rate, found in groups.items()]


def use_threads(threads: int) -> None:
    """Torch computes with this many threads from now on; 0 leaves its own choice."""
    if threads:
        torch.set_num_threads(threads)


@contextlib.contextmanager
def _without(adapted: AdaptedModel, frozen: Sequence[str]) -> Iterator[None]:
    """Inside, the adapter's `frozen` tensors take no gradient."""
    still = [parameter for key in frozen for parameter in adapted.bindings[key].parameters]
    try:
        for parameter in still:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in still:
            parameter.requires_grad_(True)


@contextlib.contextmanager
def _randomness(seed: int, job: FitJob) -> Iterator[None]:
    """Torch's global generator (dropout draws from it) stands at this job's own seed inside."""
    with torch.random.fork_rng():
        torch.manual_seed(derive_seed(seed, job.round, job.partition, "dropout"))
        yield
