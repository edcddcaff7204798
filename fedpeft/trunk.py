"""What the layers below the lowest adapter make of an example, computed once.

The base stands still, so a layer with nothing trained below or in it gives the same for an example in every step of
every round. Its activations are kept, up to so many bytes a process, and training and evaluation begin at the first
layer that has something to learn. Each example is read alone, so what is kept does not depend on whom it met in a
batch, nor on what was kept before: a run repeats to the bit, and agrees with one that keeps nothing to rounding.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import nn

from fedpeft.evaluation import autocast, padding
from fedpeft.frozen_products import by_onednn
from fedpeft.models import AdaptedModel
from fedpeft.tasks import Encoded, Task

_KEPT = "activations"
"""Under which name a batch has what was kept of its examples, `(examples, tokens, width)`."""

_CLOSE, _CLOSE_IN_FEWER_BITS = 1e-4, 3e-2
"""How far a loss from kept activations may be from the plain one, over it; the second where fewer bits are computed."""

_TRIED = 3

_logger = logging.getLogger(__name__)


class _Reached(Exception):
    """The last layer that stands still was computed, so the rest need not be."""


@dataclass
class Trunk:
    """The layers of a base below its lowest adapter, and what was kept of examples, at most `most_bytes`.

    `layers` is empty where there are none that can be left out. `pairs` says whether a layer's answer is a tuple.
    """

    layers: tuple[nn.Module, ...]
    most_bytes: int
    pairs: bool = False
    held_bytes: int = 0
    kept: dict[Hashable, torch.Tensor] = field(default_factory=dict)

    def of(self, example: Encoded, read: Callable[[Encoded], torch.Tensor]) -> torch.Tensor:
        """The activations of one example, `(tokens, width)`: those that were kept, or what `read` gives."""
        key = cast(Hashable, example) if _is_hashable(example) else id(example)
        found = self.kept.get(key)
        if found is None:
            found = read(example)
            size = found.numel() * found.element_size()
            if self.held_bytes + size <= self.most_bytes:
                self.kept[key] = found
                self.held_bytes += size
        return found

    @contextmanager
    def replaying(self, hidden: torch.Tensor) -> Iterator[None]:
        """Inside, the layers compute nothing, and what comes out of the last is `hidden`."""
        before = [layer.__dict__.get("forward") for layer in self.layers]
        first, *others = self.layers
        try:
            first.forward = partial(_answer, hidden, self.pairs)
            for layer in others:
                layer.forward = partial(_pass_on, self.pairs)
            yield
        finally:
            for layer, forward in zip(self.layers, before, strict=True):
                del layer.forward
                if forward is not None:
                    layer.forward = forward


_TRUNKS: weakref.WeakKeyDictionary[nn.Module, Trunk] = weakref.WeakKeyDictionary()
"""Those of the models of this process."""


def cached(task: Task, adapted: AdaptedModel, most_bytes: int) -> Task:
    """`task`, whose batches carry the activations of frozen lower layers, which are kept up to `most_bytes`.

    It is the same task where nothing is to be kept. Where no layer stands still, or the base does not allow to leave
    layers out, which is tried on the first batch and said in the log once, batches are plain.
    """
    if not most_bytes or task.copies != 1:
        return task

    def collate(examples: Sequence[Encoded], pad: int, device: torch.device) -> dict[str, torch.Tensor]:
        batch = dict(task.collate(examples, pad, device))
        trunk = _trunk_of(task, adapted, examples, most_bytes)
        if trunk and trunk.layers:
            batch[_KEPT] = _stacked([trunk.of(one, partial(_read, task, adapted, trunk)) for one in examples])
        return batch

    def beginning_above(compute: Callable[[nn.Module, Any], Any]) -> Callable[[nn.Module, Any], Any]:
        def computed(model: nn.Module, batch: Any) -> Any:
            if _KEPT not in batch:
                return compute(model, batch)
            with _TRUNKS[adapted.model].replaying(batch[_KEPT]):
                return compute(model, {key: value for key, value in batch.items() if key != _KEPT})

        return computed

    return task._replace(
        collate=collate,
        loss=beginning_above(task.loss),
        score=beginning_above(task.score),
        losses=task.losses and beginning_above(task.losses),
    )


def _trunk_of(task: Task, adapted: AdaptedModel, examples: Sequence[Encoded], most_bytes: int) -> Trunk | None:
    """The trunk of the model, found and tried with some of `examples` the first time.

    None while the adapter is switched off, when nobody can tell which layers it is on.
    """
    if adapted.model in _TRUNKS:
        return _TRUNKS[adapted.model]
    probe = _probed(task, adapted, examples[0])
    if not probe.whole and not adapted.model.training:
        return None
    count = next((at for at, moved in enumerate(probe.moved) if moved), len(probe.moved))
    trunk = Trunk(probe.layers[:count], most_bytes, probe.pairs)
    complaint = _complaint(task, adapted, trunk, examples[:_TRIED]) if count else "every layer has one to learn"
    complaint = complaint if probe.whole else "some adapted modules take no gradient"
    if complaint:
        _logger.warning("activations of frozen layers are not kept: %s", complaint)
    else:
        _logger.info("activations of the %d lower layers are kept", count)
    _TRUNKS[adapted.model] = trunk = replace(trunk, layers=()) if complaint else trunk
    return trunk


class _Probe(NamedTuple):
    """A base's stack of layers; of each whether what comes out follows from something trained.

    `pairs` says whether a layer's answer is a tuple, `whole` whether the loss follows from every adapted module.
    """

    layers: tuple[nn.Module, ...]
    moved: list[bool]
    pairs: bool
    whole: bool


def _probed(task: Task, adapted: AdaptedModel, example: Encoded) -> _Probe:
    """What gradients say of the base's longest stack, were all of the adapter trained."""
    lists = [module for module in adapted.model.modules() if isinstance(module, nn.ModuleList)]
    layers = max(lists, key=len, default=nn.ModuleList())
    answers: list[Any] = []
    hooks = [layer.register_forward_hook(lambda _, __, answer: answers.append(answer)) for layer in layers]
    owned = [(key.rpartition(".")[0], one) for key, binding in adapted.bindings.items() for one in binding.parameters]
    parameters = [one for _, one in owned]
    before = [one.requires_grad for one in parameters]
    try:
        for one in parameters:
            one.requires_grad_(True)
        with _alone(adapted), torch.enable_grad():
            loss = task.loss(adapted.model, task.collate([example], padding(adapted), adapted.device))
        slopes = torch.autograd.grad(loss, parameters, allow_unused=True) if loss.requires_grad else [None] * len(owned)
    finally:
        for hook in hooks:
            hook.remove()
        for one, needed in zip(parameters, before, strict=True):
            one.requires_grad_(needed)
    used = {path for (path, _), slope in zip(owned, slopes, strict=True) if slope is not None}
    pairs = any(isinstance(answer, tuple) for answer in answers)
    moved = [bool((answer[0] if pairs else answer).requires_grad) for answer in answers]
    if len(answers) != len(layers):  # layers that are called more than once, or not at all, are no stack
        return _Probe((), [], pairs, whole=True)
    return _Probe(tuple(layers), moved, pairs, {path for path, _ in owned} == used)


def _complaint(task: Task, adapted: AdaptedModel, trunk: Trunk, examples: Sequence[Encoded]) -> str:
    """Why the trunk cannot be left out, tried on `examples`; empty where it can."""
    close = _CLOSE if adapted.precision == torch.float32 else _CLOSE_IN_FEWER_BITS
    mode = adapted.model.training
    try:
        adapted.model.train()
        once, again = (_stacked([_read(task, adapted, trunk, one, seed) for one in examples]) for seed in (0, 1))
        if not torch.equal(once, again):
            return "they draw at random (model.dropout)"
        adapted.model.eval()
        with _alone(adapted), torch.no_grad():
            batch = task.collate(examples, padding(adapted), adapted.device)
            plain = task.loss(adapted.model, batch)
            with trunk.replaying(once):
                kept = task.loss(adapted.model, batch)
    except Exception as error:  # a base may refuse in any words to run in a way that it was not written for
        return f"the base does not run without them ({type(error).__name__})"
    finally:
        adapted.model.train(mode)
    agrees = bool(torch.isclose(kept, plain, rtol=close, atol=close))
    return "" if agrees else "the base computes something else without them"


def _read(task: Task, adapted: AdaptedModel, trunk: Trunk, example: Encoded, seed: int = 0) -> torch.Tensor:
    """What the trunk makes of an example that it reads alone, `(tokens, width)`."""
    seen: list[torch.Tensor] = []

    def stop(module: nn.Module, arguments: Any, answer: Any) -> None:  # noqa: ARG001
        seen.append(answer[0] if trunk.pairs else answer)
        raise _Reached

    hook = trunk.layers[-1].register_forward_hook(stop)
    try:
        with _alone(adapted, seed), torch.no_grad(), by_onednn(adapted.model, ()):
            task.loss(adapted.model, task.collate([example], padding(adapted), adapted.device))
    except _Reached:
        pass
    finally:
        hook.remove()
    return seen[0][0].detach().clone()


@contextmanager
def _alone(adapted: AdaptedModel, seed: int = 0) -> Iterator[None]:
    """Inside, tensors can be trained with later, and what is drawn leaves torch's generators as they were."""
    devices = [adapted.device] if adapted.device.type == "cuda" else []
    with torch.inference_mode(False), torch.random.fork_rng(devices), autocast(adapted):
        torch.manual_seed(seed)
        yield


def _stacked(activations: Sequence[torch.Tensor]) -> torch.Tensor:
    """`(examples, tokens, width)`, as wide as the longest; behind shorter ones is nothing."""
    return nn.utils.rnn.pad_sequence(list(activations), batch_first=True)


def _answer(hidden: torch.Tensor, pair: bool, *_: Any, **__: Any) -> Any:
    return (hidden,) if pair else hidden


def _pass_on(pair: bool, *arguments: Any, **named: Any) -> Any:
    hidden = arguments[0] if arguments else named["hidden_states"]
    return (hidden,) if pair else hidden


def _is_hashable(value: object) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True
