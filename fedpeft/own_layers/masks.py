"""Methods that train some numbers of the base and leave the others: which ones is chosen later, by a server.

The numbers stand together in one module at the root of the base. Its `places` are `(numbers, 3)`: which parameter,
which row of it and which column, a bias being one row. They are whole numbers below 2²⁴, which float32 holds as they
are. Its `values` are what is added there, zeros at first, so that the base stays as it is. The base's own parameters
are never written: while a module computes, its parameter is hidden behind one with the values added.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fedpeft.errors import AdapterError, ModelError, sentence
from fedpeft.own_layers.layers import PREFIX, Rooted, canonical, innermost
from fedpeft.own_layers.places import body, in_layers, named
from fedpeft.own_layers.settings import Settings

_MOST = 2**24
"""Float32 holds every whole number up to here."""


@dataclass(frozen=True)
class Spot:
    """A parameter of which numbers may be trained: its module, its name there, its rows and columns."""

    module: nn.Module
    tensor: str
    shape: tuple[int, int]

    @property
    def original(self) -> torch.Tensor:
        """The base's own numbers."""
        return self.module.get_parameter(self.tensor)


class Mask(Rooted):
    """The numbers that are trained, and their places among `spots`; `balanced` is what `places_at` is to be told."""

    def __init__(self, method: str, spots: Sequence[Spot], count: int, *, balanced: bool) -> None:
        super().__init__()
        device = next(iter(spots[0].module.parameters())).device
        self.method, self.balanced, self.off = method, balanced, False
        self.values = nn.Parameter(torch.zeros(count, device=device))
        self.places = nn.Parameter(torch.zeros(count, 3, device=device))
        self.__dict__["spots"], self.__dict__["handles"] = tuple(spots), []
        self._read: torch.Tensor | None = None
        self._sorted: list[tuple[torch.Tensor, torch.Tensor]] = []

    def at(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the parameter with this number among the spots: where in it, flat, and which of the values.

        Raises:
            AdapterError: a place is none of the base.
        """
        places = self.places.detach()
        if self._read is None or not torch.equal(self._read, places):
            self._sorted = self._sort(places)
            self._read = places.clone()
        return self._sorted[number]

    def changed(self, number: int) -> torch.Tensor | None:
        """The parameter with this number among the spots with the values added, in its own type; None if it has none.

        Raises:
            AdapterError: a place is none of the base.
        """
        where, which = self.at(number)
        if not len(which):
            return None
        original, values = spots(self)[number].original, self.values[which]
        wide = original.to(torch.promote_types(original.dtype, values.dtype))
        changed = wide.flatten().index_add(0, where, values.to(wide.dtype))
        return changed.view_as(original).to(original.dtype)

    def _sort(self, places: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        parameters, rows, columns = places.long().unbind(1)
        shapes = torch.tensor([spot.shape for spot in self.__dict__["spots"]], device=places.device)
        known = (parameters >= 0) & (parameters < len(shapes)) & (places == places.round()).all(1)
        heights, widths = shapes[parameters.clamp(0, len(shapes) - 1)].unbind(1)
        known &= (rows >= 0) & (rows < heights) & (columns >= 0) & (columns < widths)
        if not bool(known.all()):
            raise AdapterError(
                sentence(
                    f"adapter.{self.method}, places",
                    expected="parameters, rows and columns of the base",
                    found=[round(float(part), 3) for part in places[~known][0]],
                    remedy="use the base model that the places were chosen in",
                )
            )
        flat = rows * widths + columns
        chosen = [(parameters == number).nonzero().squeeze(1) for number in range(len(shapes))]
        return [(flat[which], which) for which in chosen]


@dataclass(frozen=True)
class _Hide:
    """Before a module computes: its parameter is hidden behind what the mask makes of it, if it changes any of it."""

    mask: Mask
    number: int

    def __call__(self, module: nn.Module, _: Any) -> None:
        changed = None if self.mask.off else self.mask.changed(self.number)
        if changed is not None:
            module.__dict__[spots(self.mask)[self.number].tensor] = changed


@dataclass(frozen=True)
class _Show:
    """After a module has computed, or failed to: its parameter is the base's own again."""

    tensor: str

    def __call__(self, module: nn.Module, *_: Any) -> None:
        module.__dict__.pop(self.tensor, None)


def put_mask(base: nn.Module, method: str, settings: Settings) -> None:
    """`base` has a mask over a share of the numbers of its parameters, none of which has been chosen yet.

    Tied parameters are left out, and the task's own head. On an error the base is as it was.

    Raises:
        ModelError: the base's weights are quantised, or there is nothing that the settings name.
    """
    spots = [] if masks(base) else _spots(base, method, settings)
    if not spots:
        raise ModelError(
            sentence(
                f"adapter.{method}",
                expected="parameters that no method trains",
                found=f"none in {type(base).__name__}",
                remedy="name other modules, or install it once",
            )
        )
    count = round(settings.share * sum(spot.module.get_parameter(spot.tensor).numel() for spot in spots))
    if not count:
        remedy = "raise it"
        raise ModelError(
            sentence(f"adapter.{method}.share", expected="one number at least", found=settings.share, remedy=remedy)
        )
    mask = Mask(method, spots, count, balanced=settings.balanced)
    for number, spot in enumerate(spots):
        mask.__dict__["handles"] += [
            spot.module.register_forward_pre_hook(_Hide(mask, number)),
            spot.module.register_forward_hook(_Show(spot.tensor), always_call=True),
        ]
    base.add_module(f"{PREFIX}{method}", mask)


def masks(model: nn.Module) -> list[Mask]:
    """The masks on `model`."""
    return [module for module in model.modules() if isinstance(module, Mask)]


def spots(mask: Mask) -> tuple[Spot, ...]:
    """The parameters that the places of a mask count."""
    found: tuple[Spot, ...] = mask.__dict__["spots"]
    return found


def take_masks(model: nn.Module, *, keep: bool) -> None:
    """No mask is on `model`; what the masks added stays in the base's weights if `keep`, else it is lost."""
    for mask in masks(model):
        for handle in mask.__dict__["handles"]:
            handle.remove()
        for number, spot in enumerate(spots(mask)):
            changed = mask.changed(number) if keep else None
            if changed is not None:
                spot.original.data.copy_(changed.detach())
    for module in list(model.modules()):
        for name in [name for name, child in module.named_children() if isinstance(child, Mask)]:
            delattr(module, name)


def places_at(scores: Sequence[torch.Tensor], count: int, *, balanced: bool = False) -> torch.Tensor:
    """The places `(count, 3)`, in order, of the greatest of `scores`, one tensor a parameter; of equals the first.

    Where they are `balanced`, each parameter has its share of the places: its numbers are ranked among themselves.
    """
    flat = torch.cat([(_quantiles(score) if balanced else score).flatten() for score in scores])
    chosen = torch.sort(flat, descending=True, stable=True).indices[:count].sort().values
    starts = torch.tensor([0, *(score.numel() for score in scores)]).cumsum(0)
    parameters = torch.searchsorted(starts, chosen.cpu(), right=True) - 1
    widths = torch.tensor([_matrix(score)[1] for score in scores])[parameters]
    within = chosen.cpu() - starts[parameters]
    return torch.stack([parameters, within // widths, within % widths], 1).float()


def _quantiles(score: torch.Tensor) -> torch.Tensor:
    """For each number the share of the tensor's numbers that come behind it."""
    order = torch.sort(score.flatten(), descending=True, stable=True).indices
    places = torch.arange(len(order), device=score.device, dtype=torch.float64)
    return torch.empty_like(places).index_copy(0, order, 1 - (places + 0.5) / max(1, len(order)))


def _matrix(tensor: torch.Tensor) -> tuple[int, int]:
    """Rows and columns: the last axis counts the columns, all others the rows."""
    columns = tensor.shape[-1] if tensor.dim() else 1
    return tensor.numel() // max(1, columns), columns


def _spots(base: nn.Module, method: str, settings: Settings) -> list[Spot]:
    modules = body(base)
    paths = list(modules)
    if settings.target_modules:
        under = named(modules, settings.target_modules, method)
        paths = [path for path in paths if any(f"{path}.".startswith(f"{one}.") for one in under)]
    holding = [path for path in paths if any(True for _ in innermost(modules[path]).parameters(recurse=False))]
    uses = Counter(id(parameter) for _, parameter in base.named_parameters(remove_duplicate=False))
    found = []
    for path in in_layers(holding, settings.layers, method):
        inner = innermost(modules[path])
        for name, parameter in inner.named_parameters(recurse=False):
            _require_plain(parameter, method, canonical(path))
            shape = _matrix(parameter)
            if uses[id(parameter)] == 1 and max(shape) < _MOST:
                found.append(Spot(inner, name, shape))
    return found


def _require_plain(parameter: torch.Tensor, method: str, path: str) -> None:
    if not parameter.is_floating_point():
        raise ModelError(
            sentence(
                f"adapter.{method} on {path}",
                expected="weights that are not quantised",
                found=str(parameter.dtype).removeprefix("torch."),
                remedy='set model.weights = "float32" or "bfloat16", or choose lora',
            )
        )
