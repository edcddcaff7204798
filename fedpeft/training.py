"""Local training of an adapter on one site's examples."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from fedpeft.adapters import AdapterSpec, AdapterState
from fedpeft.batches import batches_from, by_coin, each_once
from fedpeft.client import FitJob, Fitted, Learner
from fedpeft.compiling import compiled
from fedpeft.config.training import TrainingConfig
from fedpeft.corrections import Pull, pull_of
from fedpeft.errors import FederationError, PlanError, sentence
from fedpeft.evaluation import autocast, evaluate, leanly, padding
from fedpeft.gradient_checks import way_for
from fedpeft.models import AdaptedModel, extract, install, trained
from fedpeft.privacy.entropy import SOURCES
from fedpeft.privacy.examples import POISSON, ExamplePrivacy, expected_examples, sampling_rate
from fedpeft.private_steps import PrivateSteps
from fedpeft.randomness import derive_seed
from fedpeft.tasks import Encoded, Task

LIBRARY_BYTES = 500_000_000
"""Bytes that Python, torch and transformers take before a model is loaded, as measured on Linux."""


@dataclass(frozen=True)
class TorchLearner:
    """A site's model, task and examples; implements `fedpeft.client.Learner`.

    `rounds` is the length of the run, over which the learning rate is scheduled. The model may be shared by
    the learners of one process: each fit and each evaluation first installs the adapter that it is given. With
    `private`, each example is protected from whoever sees what a fit gives, but for its metrics and tokens.
    """

    adapted: AdaptedModel
    task: Task
    examples: tuple[Encoded, ...]
    settings: TrainingConfig
    seed: int
    rounds: int
    evaluation_batch_size: int
    private: ExamplePrivacy | None = None

    @property
    def spec(self) -> AdapterSpec:
        """The specification of the adapter that this learner trains."""
        return self.adapted.spec

    @property
    def start(self) -> AdapterState:
        """The adapter before any training."""
        return self.adapted.initial

    def fit(self, adapter: AdapterState, job: FitJob) -> Fitted:
        """Trains from `adapter` for the settings' number of steps.

        Raises:
            FederationError: the loss is not finite.
            PlanError: examples are to be protected where none has a gradient of its own, or in a run with control
                variates or pruning.
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
    clipped: int = 0


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
    optimizer = torch.optim.AdamW(rate_groups(parameters, learner), weight_decay=settings.weight_decay)
    scaled = adapted.precision == torch.float16 and learner.private is None
    scaler = torch.amp.GradScaler(adapted.device.type, enabled=scaled)
    pull = pull_of(parameters, settings.proximal, job)
    batches = batches_from(learner.examples, settings.batch_size, learner.seed, job.partition, job.position)
    seen = _Seen()
    accumulate: Callable[[], None] = partial(_accumulate, learner, batches, scaler, seen)
    if learner.private:
        accumulate = _private_accumulation(learner, learner.private, job, parameters, batches, seen)
    first_step = (job.round - 1) * settings.steps
    adapted.model.train()
    steps = compiled(adapted.model, settings.compiled) if settings.compiled else leanly(adapted)
    with _without(adapted, job.frozen), _randomness(learner.seed, job), steps:
        for step in range(first_step, first_step + settings.steps):
            rate = learning_rate_factor(settings, step, learner.rounds * settings.steps)
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * rate
            accumulate()
            _finish_step(list(parameters.values()), pull, optimizer, scaler, settings)
    return Fitted(
        before=before,
        after=extract(adapted).tensors,
        examples=round(settings.steps * _expected(learner)) if learner.private else seen.examples,
        tokens=seen.tokens,
        position=job.position + settings.steps * settings.accumulation,
        metrics={
            **(_unprotected(seen) if learner.private else {"loss": mean_loss(seen.losses, job)}),
            "learning_rate": settings.learning_rate * rate,
        },
        gradients={key: np.array(total.cpu().numpy() / settings.steps) for key, total in pull.gradients.items()},
    )


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
    own = len(longest) if learner.private else 0  # each example has a gradient of its own
    return (16 + 4 * own) * adapted.spec.parameters + sum(kept.values())


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


def _private_accumulation(
    learner: TorchLearner,
    privacy: ExamplePrivacy,
    job: FitJob,
    parameters: Mapping[str, nn.Parameter],
    batches: Iterator[list[Encoded]],
    seen: _Seen,
) -> Callable[[], None]:
    """What takes the place of `_accumulate` where each example is protected.

    Raises:
        PlanError: no example has a gradient of its own, or the job tells of others than the examples' gradients.
    """
    if job.correction or job.pruning:
        raise PlanError(
            sentence(
                "training that protects each example",
                expected="no control variates and no pruning, which would tell more of examples than is accounted",
                found="training.scaffold" if job.correction else "a rule that prunes ranks",
                remedy="do without one of the two",
            )
        )
    settings, drawn = learner.settings, partial(SOURCES[privacy.entropy], learner.seed, job.round, job.partition)
    steps = PrivateSteps(
        adapted=learner.adapted,
        task=learner.task,
        parameters=parameters,
        privacy=privacy,
        way=way_for(learner.adapted, learner.task, parameters, learner.examples),
        noise=drawn("noise on gradients"),
        at_once=settings.batch_size,
        expected=_expected(learner),
    )
    rate = sampling_rate(len(learner.examples), settings.batch_size * settings.accumulation)
    coins = by_coin(learner.examples, rate, drawn("examples of steps"))
    stream = coins if privacy.sampler == POISSON else each_once(batches, settings.accumulation)

    def accumulate() -> None:
        examples = next(stream)
        stepped = steps.take(examples)
        seen.examples += len(examples)
        seen.tokens += sum(example.size for example in examples)
        seen.losses += stepped.losses
        seen.clipped += stepped.clipped

    return accumulate


def _expected(learner: TorchLearner) -> float:
    return expected_examples(len(learner.examples), learner.settings.batch_size * learner.settings.accumulation)


def _unprotected(seen: _Seen) -> dict[str, float]:
    """The mean loss of the examples that were drawn, and the share of their gradients that were clipped.

    A loss that is not finite is left out: to fail on it would tell of one example.
    """
    losses = torch.cat(seen.losses).double().cpu().numpy() if seen.losses else np.zeros(0)
    finite = losses[np.isfinite(losses)]
    figures = {"loss": float(finite.mean())} if finite.size else {}
    return {**figures, **({"clipped_examples": seen.clipped / seen.examples} if seen.examples else {})}


def _finish_step(
    parameters: Sequence[nn.Parameter],
    pull: Pull,
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


def mean_loss(found: Sequence[torch.Tensor], job: FitJob) -> float:
    """The mean of the losses of one fit.

    Raises:
        FederationError: one is not finite.
    """
    losses = torch.stack(list(found)).double().cpu().numpy()
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


def rate_groups(parameters: Mapping[str, nn.Parameter], learner: TorchLearner) -> list[dict[str, Any]]:
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
