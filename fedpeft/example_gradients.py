"""Gradients of a batch's examples one by one, and the sum of them with each clipped.

There are several ways to the same numbers. Two run the model on the whole batch, but every layer that holds something
trained on each row with a copy of its own of what is trained, so that the copies' gradients are the examples'. One
does so for all rows at once, the other row by row, for layers that cannot compute otherwise. The last way takes the
examples one at a time and is always right; `fedpeft.gradient_checks` holds the others against it before one is used.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.func import functional_call, vmap
from torch.utils import _pytree as pytree

from fedpeft.errors import PlanError, sentence
from fedpeft.evaluation import autocast, padding
from fedpeft.models import AdaptedModel
from fedpeft.replacing import replaced
from fedpeft.tasks import Encoded, Task


class Taken(NamedTuple):
    """The gradients of a batch, one tensor `(batch, *shape)` for each that is trained, and its losses `(batch,)`."""

    gradients: tuple[torch.Tensor, ...]
    losses: torch.Tensor


Way = Callable[[AdaptedModel, Task, Sequence[nn.Parameter], Sequence[Encoded]], Taken]
"""`way(adapted, task, parameters, examples)`: the gradients of the examples' losses with respect to the parameters."""

Row = Callable[[Mapping[str, torch.Tensor], Sequence[torch.Tensor]], Any]
"""What a layer makes of one row, by the row's own copy of what is trained."""

Mapped = Callable[[Row, Mapping[str, torch.Tensor], Sequence[torch.Tensor], bool], Any]
"""`mapped(row, copies, tensors, split)`: what it makes of all rows; `split` says that each reads its own of tensors."""


def clipped_sum(taken: Taken, clip_norm: float) -> tuple[list[torch.Tensor], int]:
    """The sum of the gradients, each scaled to a norm of at most `clip_norm`, float64; and how many were longer.

    A gradient that is not finite counts as zero, so that no example can do more than another.
    """
    flat = [gradient.reshape(len(gradient), -1) for gradient in taken.gradients]
    norms = torch.stack([torch.linalg.vector_norm(one, dim=1, dtype=torch.float64) for one in flat]).norm(dim=0)
    finite = norms.isfinite()
    if not bool(finite.all()):
        flat = [one.masked_fill(~finite[:, None], 0.0) for one in flat]
    factors = torch.where(finite, (clip_norm / norms).clamp(max=1.0), 0.0)
    sums = [
        (factors.to(one.dtype) @ one).double().view(gradient.shape[1:])
        for one, gradient in zip(flat, taken.gradients, strict=True)
    ]
    return sums, int((~finite | (norms > clip_norm)).sum())


def one_at_a_time(
    adapted: AdaptedModel, task: Task, parameters: Sequence[nn.Parameter], examples: Sequence[Encoded]
) -> Taken:
    """The examples alone, each in a batch of its own."""
    found, losses = [], []
    for example in examples:
        with autocast(adapted):
            loss = losses_of(task, adapted.model, batch_of(adapted, task, [example]), 1)
        gradients = torch.autograd.grad(loss.sum(), parameters, allow_unused=True)
        found.append(_whole(gradients, parameters))
        losses.append(loss.detach())
    return Taken(tuple(torch.stack(one) for one in zip(*found, strict=True)), torch.cat(losses))


def in_layers(
    adapted: AdaptedModel,
    task: Task,
    parameters: Sequence[nn.Parameter],
    examples: Sequence[Encoded],
    mapped: Mapped,
) -> Taken:
    """The examples together, with a copy of the parameters for each in the layers that hold them."""
    count = len(examples)
    copies = [one.detach().expand(count, *one.shape).requires_grad_() for one in parameters]
    rows = {id(one): torch.cat([copy] * task.copies) for one, copy in zip(parameters, copies, strict=True)}
    with _splitting(adapted.model, rows, mapped):
        with autocast(adapted):
            losses = losses_of(task, adapted.model, batch_of(adapted, task, examples), count)
        gradients = torch.autograd.grad(losses.sum(), copies, allow_unused=True)
    return Taken(_whole(gradients, copies), losses.detach())


def _at_once(row: Row, copies: Mapping[str, torch.Tensor], tensors: Sequence[torch.Tensor], split: bool) -> Any:
    return vmap(row, in_dims=(0, 0 if split else None), randomness="different")(copies, tensors)


def _row_by_row(row: Row, copies: Mapping[str, torch.Tensor], tensors: Sequence[torch.Tensor], split: bool) -> Any:
    made = [
        row({name: copy[at] for name, copy in copies.items()}, [one[at] for one in tensors] if split else tensors)
        for at in range(len(next(iter(copies.values()))))
    ]
    return pytree.tree_map(lambda *each: torch.stack(each), *made)


WAYS: Mapping[str, Way] = {
    "for all rows at once in the adapter's layers": partial(in_layers, mapped=_at_once),
    "row by row in the adapter's layers": partial(in_layers, mapped=_row_by_row),
    "one example at a time": one_at_a_time,
}
"""Every way, the fastest first; the last is right by definition."""


class Inside(nn.Module):
    """A layer as a module around it, so that it can be computed with other numbers and no hook runs twice."""

    def __init__(self, layer: nn.Module, compute: Callable[..., Any]) -> None:
        super().__init__()
        self.layer = layer
        self.compute = compute

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What `compute` makes of it."""
        return self.compute(*args, **kwargs)


@contextlib.contextmanager
def _splitting(model: Any, rows: Mapping[int, torch.Tensor], mapped: Mapped) -> Iterator[None]:
    """Inside, layers compute each row with its own copy: `rows` are those of a parameter, by its id."""
    with contextlib.ExitStack() as undone:
        for layer, names in layers_of(model, rows).items():
            copies = {f"layer.{name}": copy for name, copy in names.items()}
            undone.enter_context(replaced(layer, "forward", _split(layer, copies, mapped)))
        ask = getattr(model, "get_prompt", None)
        if ask is not None and model.active_peft_config.peft_type != "PREFIX_TUNING":
            # Peft asks for its prompt once and repeats it; what comes here has all rows already.
            undone.enter_context(replaced(model, "get_prompt", lambda batch_size, **more: ask(1, **more)))  # noqa: ARG005
        yield


def _split(layer: nn.Module, copies: Mapping[str, torch.Tensor], mapped: Mapped) -> Callable[..., Any]:
    compute: Any = layer.forward
    inside, count = Inside(layer, compute), len(next(iter(copies.values())))

    @functools.wraps(compute)
    def forward(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return compute(*args, **kwargs)
        leaves, shape = pytree.tree_flatten((args, kwargs))
        places = [at for at, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
        sizes = {len(leaves[at]) for at in places}
        if sizes not in ({count}, {1}):
            raise ValueError(f"tensors for {sizes} rows where {count} are expected")

        def row(own: Mapping[str, torch.Tensor], tensors: Sequence[torch.Tensor]) -> Any:
            given = list(leaves)
            for at, tensor in zip(places, tensors, strict=True):
                given[at] = tensor[None] if split else tensor
            own_args, own_kwargs = pytree.tree_unflatten(given, shape)
            made = functional_call(inside, dict(own), own_args, own_kwargs)
            return pytree.tree_map_only(torch.Tensor, lambda tensor: tensor[0], made)

        split = sizes == {count}
        return mapped(row, copies, [leaves[at] for at in places], split)

    return forward


def layers_of(model: nn.Module, rows: Mapping[int, torch.Tensor]) -> dict[nn.Module, dict[str, torch.Tensor]]:
    """The layers that are to compute row by row, and in each the copies of what it holds, by name there."""
    modules = dict(model.named_modules())
    held = [
        (name, rows[id(parameter)])
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if id(parameter) in rows
    ]
    paths = {_layer_of(name, modules) for name, _ in held}
    found: dict[nn.Module, dict[str, torch.Tensor]] = {}
    for name, copies in held:
        outermost = next(path for path in _above(name) if path in paths)
        found.setdefault(modules[outermost], {})[name[len(outermost) + 1 :] if outermost else name] = copies
    return found


def _layer_of(name: str, modules: Mapping[str, nn.Module]) -> str:
    """The path of the layer to split for a parameter: what stands around one of the base, a prompt, or its module."""
    above = _above(name)
    around = (path for path in above if "base_layer" in modules[path]._modules)
    prompt = (path for path in above if path.rpartition(".")[0] == "prompt_encoder")
    computing = (path for path in reversed(above) if not isinstance(modules[path], _CONTAINERS))
    return [*around, *prompt, *computing][0]


_CONTAINERS = (nn.ModuleDict, nn.ModuleList, nn.ParameterDict, nn.ParameterList)


def _above(name: str) -> list[str]:
    """The paths of the modules that a parameter is in, the model's first."""
    parts = name.split(".")
    return [".".join(parts[:depth]) for depth in range(len(parts))]


def losses_of(task: Task, model: nn.Module, batch: Any, count: int) -> torch.Tensor:
    """The losses of a batch of `count` examples, `(count,)`.

    Raises:
        PlanError: the task does not tell them apart.
    """
    if task.losses is None:
        raise refusal(
            "a task that tells the losses of examples apart",
            "one that does not",
            "give it one that does (packed texts do not: set task.causal_lm.packing=false)",
        )
    losses = task.losses(model, batch)
    if losses.shape != (count,):
        raise ValueError(f"losses of shape {tuple(losses.shape)} of {count} examples")
    return losses


def batch_of(adapted: AdaptedModel, task: Task, examples: Sequence[Encoded]) -> Any:
    """The examples as a batch, where the model is."""
    return task.collate(examples, padding(adapted), adapted.device)


def _whole(gradients: Sequence[torch.Tensor | None], like: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """The gradients, with zeros where nothing depends on a parameter."""
    return tuple(
        torch.zeros_like(one) if gradient is None else gradient for gradient, one in zip(gradients, like, strict=True)
    )


def refusal(expected: str, found: object, remedy: str) -> PlanError:
    """The error of a plan under which an example has no gradient of its own."""
    return PlanError(sentence("training that protects each example", expected=expected, found=found, remedy=remedy))
