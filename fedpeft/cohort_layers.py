"""One pass of a model over the rows of several clients, in which each client's rows meet its own adapter.

Rows stand client by client, each with as many. A layer that holds something trained is computed for all clients at
once, each with numbers of its own: LoRA on linear layers as batched matrix products, others by `vmap`, in which factors
become such products and vectors are broadcast. Whatever is frozen inside it, a quantised matrix for instance, sees all
rows as one batch, as does the rest of the model.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.func import functional_call, vmap
from torch.utils import _pytree as pytree

from fedpeft.cohort_products import Numbers, batched
from fedpeft.example_gradients import Inside, layers_of
from fedpeft.replacing import replaced

Tensors = list[torch.Tensor]

One = Callable[[Numbers, Sequence[torch.Tensor]], Tensors]
"""What a layer makes of one client's rows, by the client's own numbers."""

Way = Callable[[One, Numbers, Sequence[torch.Tensor], Sequence[int | None]], Tensors]
"""`way(one, own, given, dims)`: what `one` makes for each client, `(clients, ...)`; `dims` are those of their rows."""


@contextlib.contextmanager
def side_by_side(model: Any, stacks: Mapping[int, torch.Tensor], rows: int, way: Way) -> Iterator[None]:
    """Inside, `model` takes `rows` rows of each client in turn, and computes each client's with its own numbers.

    `stacks` are `(clients, *shape)` for each parameter that clients have of their own, by its id.
    """
    with contextlib.ExitStack() as undone:
        for layer, names in layers_of(model, stacks).items():
            own = {f"layer.{name}": stack for name, stack in names.items()}
            forward = _for_clients(layer, own, rows, way)
            if way is at_once:
                forward = batched(layer, names, rows, forward)
            undone.enter_context(replaced(layer, "forward", forward))
        ask = getattr(model, "get_prompt", None)
        if ask is not None and model.active_peft_config.peft_type != "PREFIX_TUNING":
            # Peft asks for its prompt once and repeats it; what comes here has all rows already.
            undone.enter_context(replaced(model, "get_prompt", lambda batch_size, **more: ask(1, **more)))  # noqa: ARG005
        yield


def at_once(one: One, own: Numbers, given: Sequence[torch.Tensor], dims: Sequence[int | None]) -> Tensors:
    """All clients in one computation: factors become batched products, vectors are broadcast."""
    made: Tensors = vmap(one, in_dims=(0, list(dims)), randomness="different")(own, given)
    return made


def client_by_client(one: One, own: Numbers, given: Sequence[torch.Tensor], dims: Sequence[int | None]) -> Tensors:
    """One client after another, for layers that cannot compute otherwise."""
    made = [
        one(
            {name: stack[at] for name, stack in own.items()},
            [tensor if dim is None else tensor[at] for tensor, dim in zip(given, dims, strict=True)],
        )
        for at in range(len(next(iter(own.values()))))
    ]
    return [torch.stack(each) for each in zip(*made, strict=True)]


WAYS: Mapping[str, Way] = {"for all clients at once": at_once, "client by client": client_by_client}
"""How layers that hold something trained compute for several clients, the fastest first."""


def _for_clients(layer: nn.Module, own: Numbers, rows: int, way: Way) -> Callable[..., Any]:
    compute: Any = layer.forward
    inside, clients = Inside(layer, compute), len(next(iter(own.values())))
    frozen = [
        module
        for name, module in layer.named_modules()
        if name.rpartition(".")[2] == "base_layer" and not any(key.startswith(f"layer.{name}.") for key in own)
    ]

    @functools.wraps(compute)
    def forward(*args: Any, **kwargs: Any) -> Any:
        leaves, shape = pytree.tree_flatten((args, kwargs))
        places = [at for at, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
        dims = [_dimension(leaves[at], clients * rows) for at in places]
        given = [
            leaves[at].unflatten(0, (clients, rows)) if dim == 0 else leaves[at]
            for at, dim in zip(places, dims, strict=True)
        ]
        form: list[tuple[list[Any], Any]] = []

        def one(numbers: Numbers, tensors: Sequence[torch.Tensor]) -> Tensors:
            filled = list(leaves)
            for at, tensor in zip(places, tensors, strict=True):
                filled[at] = tensor
            own_args, own_kwargs = pytree.tree_unflatten(filled, shape)
            made, form_of_made = pytree.tree_flatten(functional_call(inside, dict(numbers), own_args, own_kwargs))
            form[:] = [([None if isinstance(leaf, torch.Tensor) else (leaf,) for leaf in made], form_of_made)]
            return [leaf for leaf in made if isinstance(leaf, torch.Tensor)]

        with contextlib.ExitStack() as undone:
            if way is at_once:
                for module in frozen:
                    undone.enter_context(replaced(module, "forward", functools.partial(_whole, module.forward)))
            made = iter(way(one, own, given, dims))
        others, form_of_made = form[0]
        filled = [_as_rows(next(made), rows) if other is None else other[0] for other in others]
        return pytree.tree_unflatten(filled, form_of_made)

    return forward


def _dimension(tensor: torch.Tensor, count: int) -> int | None:
    """Where a tensor has the clients' rows: in front, or nowhere, where it is one row that all share."""
    if tensor.ndim and len(tensor) == count:
        return 0
    if tensor.ndim == 0 or len(tensor) == 1:
        return None
    raise ValueError(f"a tensor of shape {tuple(tensor.shape)} where {count} rows are expected")


def _as_rows(made: torch.Tensor, rows: int) -> torch.Tensor:
    """`(clients, rows, ...)` as rows one below the other; what a client has once is said for each of its rows."""
    if made.shape[1] == rows:
        return made.flatten(0, 1)
    return made.expand(-1, rows, *made.shape[2:]).flatten(0, 1)


def _whole(compute: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    leaves, shape = pytree.tree_flatten((args, kwargs))
    places = [at for at, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]

    def of(*tensors: torch.Tensor) -> Any:
        filled = list(leaves)
        for at, tensor in zip(places, tensors, strict=True):
            filled[at] = tensor
        own_args, own_kwargs = pytree.tree_unflatten(filled, shape)
        return compute(*own_args, **own_kwargs)

    made: Any = _AsOneBatch.apply(of, *(leaves[at] for at in places))  # type: ignore[no-untyped-call]
    return made


class _AsOneBatch(torch.autograd.Function):
    """What is frozen computes all clients' rows as one batch, in whatever way it is written."""

    @staticmethod
    def forward(compute: Callable[..., Any], *tensors: torch.Tensor) -> Any:
        """Not reached: see `vmap`."""
        return compute(*tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Nothing is kept: see `vmap`."""

    @staticmethod
    def vmap(info: Any, dims: Any, compute: Callable[..., Any], *tensors: torch.Tensor) -> Any:
        """The rows of all clients through `compute`."""
        if all(dim is None for dim in dims):
            return compute(*tensors), None
        flat = [
            tensor if dim is None else tensor.movedim(dim, 0).flatten(0, 1)
            for tensor, dim in zip(tensors, dims[1:], strict=True)
        ]
        return compute(*flat).unflatten(0, (info.batch_size, -1)), 0
