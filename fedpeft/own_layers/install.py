"""A method put onto a frozen base, and taken off again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from fedpeft.errors import ModelError, sentence
from fedpeft.own_layers.layers import (
    FIRST,
    Bottleneck,
    OwnLayer,
    Prompted,
    Scaled,
    Scaling,
    Vectors,
    canonical,
    claims,
    innermost,
    own_layers,
    put,
    trainable,
    width_into,
    width_out_of,
)
from fedpeft.own_layers.masks import put_mask, take_masks
from fedpeft.own_layers.methods import Method
from fedpeft.own_layers.places import body, in_layers, named, norms, playing, roles_of, scalable
from fedpeft.own_layers.settings import Settings, method_of, settings_of


def install(base: nn.Module, method: str, settings: Mapping[str, Any]) -> None:
    """`base`, which is frozen, computes with a fresh adapter of `method`, whose parameters alone require gradients.

    It computes what it did before, to the bit. Several methods may be installed one after another, and one of peft's
    after them. What is drawn is drawn from torch's global generator. A base that cannot be adapted is left as it was.

    Raises:
        ModelError: the method or a setting is unknown, or the base has nothing that it fits.
    """
    row = method_of(method)
    wanted = settings_of(row, settings)
    if row.masks:
        put_mask(base, row.name, wanted)
    elif row.adds_layers:
        for path, layer in _fresh(base, row, wanted).items():
            put(base, path, layer)
    else:
        for module, name in _choose(base, row, wanted):
            parameter = module.get_parameter(name)
            module.register_buffer(f"{FIRST}{name}", parameter.detach().clone(), persistent=False)
            parameter.requires_grad_(True)


def retrain(model: nn.Module) -> None:
    """The methods' own parameters require gradients, as they did before peft froze the base that they are on."""
    for parameter in trainable(model).values():
        parameter.requires_grad_(True)


def remove(model: nn.Module) -> None:
    """`model` is as it was before any method was installed; what was trained is lost."""
    take_masks(model, keep=False)
    for path, layer in reversed(own_layers(model).items()):
        put(model, path, layer.base_layer)
    for module, name in claims(model):
        parameter = module.get_parameter(name)
        parameter.data = module.get_buffer(f"{FIRST}{name}").data
        release(module, name)


def release(module: nn.Module, name: str) -> None:
    """The parameter called `name` of `module` is the base's own again, frozen, at the value that it has."""
    parameter = module.get_parameter(name)
    parameter.grad = None
    parameter.requires_grad_(False)
    delattr(module, f"{FIRST}{name}")


def _fresh(base: nn.Module, method: Method, settings: Settings) -> dict[str, OwnLayer]:
    """A layer for each module that gets one, by path, inner ones first."""
    modules = body(base)
    kinds = dict(_placed(base, modules, method, settings))
    paths = in_layers([path for path in modules if path in kinds], settings.layers, method.name)
    layers: dict[str, OwnLayer] = {}
    for path in paths:
        place = f"adapter.{method.name} on {canonical(path)}"
        _require_new(modules[path], method, place)
        own = _own(kinds[path], modules[path], settings, place)
        layers[path] = kinds[path](modules[path], method.name, own)
    return dict(reversed(layers.items()))


def _placed(
    base: nn.Module, modules: Mapping[str, nn.Module], method: Method, settings: Settings
) -> Iterator[tuple[str, type[OwnLayer]]]:
    """The paths of the modules that get a layer, and which."""
    if method.find:
        found = method.find(modules)
        if not found:
            raise ModelError(_NOTHING[method.name](type(base).__name__))
        yield from ((path, method.unnamed) for path in found)
        return
    if not method.placements:
        chosen = named(modules, settings.target_modules, method.name) if settings.target_modules else scalable(modules)
        yield from ((path, Scaled) for path in chosen)
        return
    if settings.target_modules:
        known = {path: kind for roles in _known(modules, base, method) for path, kind in roles}
        for path in named(modules, settings.target_modules, method.name):
            yield path, known.get(path, method.unnamed)
        return
    roles = roles_of(modules, base, method.name)
    placement = next(one for one in method.placements if any(role in roles for role, _ in one))
    for role, kind in placement:
        yield from ((path, kind) for path in playing(modules, roles.get(role, ())))


def _known(
    modules: Mapping[str, nn.Module], base: nn.Module, method: Method
) -> Iterator[list[tuple[str, type[OwnLayer]]]]:
    """The layers that the method's table gives to parts of a known architecture; none for another."""
    try:
        roles = roles_of(modules, base, method.name)
    except ModelError:
        return
    for placement in method.placements:
        for role, kind in placement:
            yield [(path, kind) for path in playing(modules, roles.get(role, ()))]


def _own(kind: type[OwnLayer], module: nn.Module, settings: Settings, place: str) -> nn.Module:
    width = width_out_of(module, place)
    if kind is Scaled:
        return Scaling(width, trailing=2 if isinstance(innermost(module), nn.Conv2d) else 0)
    if kind is Prompted:
        return Vectors(settings.tokens, width, _patch(module))
    inputs = width_into(module, place) if kind.reads_input else width
    return Bottleneck(inputs, width, settings.size(width), settings.scale, settings.activation)


def _patch(module: Any) -> int:
    """The side of a patch, in pixels."""
    projection: Any = innermost(module).get_submodule("patch_embeddings.projection")
    size = projection.kernel_size
    return int(size[0] if isinstance(size, tuple) else size)


def _require_new(module: nn.Module, method: Method, place: str) -> None:
    while isinstance(module, OwnLayer):
        if module.method == method.name:
            raise ModelError(
                sentence(place, expected="a module without it", found="one that has it", remedy="install it once")
            )
        module = module.base_layer


def _choose(base: nn.Module, method: Method, settings: Settings) -> list[tuple[nn.Module, str]]:
    """The parameters of the base that a method trains: the module that holds each, and its name there."""
    modules = {path: innermost(module) for path, module in body(base).items()}
    wanted = _BY_METHOD[method.name](modules, settings)
    if settings.target_modules:
        under = named(modules, settings.target_modules, method.name)
        wanted = [(path, name) for path, name in wanted if any(f"{path}.".startswith(f"{one}.") for one in under)]
    if not wanted:
        raise ModelError(_NOTHING[method.name](type(base).__name__))
    taken = {id(module.get_parameter(name)) for module, name in claims(base)}
    inside = set(in_layers([path for path, _ in wanted], settings.layers, method.name))
    chosen: list[tuple[nn.Module, str]] = []
    for path, name in wanted:
        parameter = modules[path].get_parameter(name)
        if path in inside and parameter.is_floating_point() and id(parameter) not in taken:
            taken.add(id(parameter))
            chosen.append((modules[path], name))
    if not chosen:
        place = f"adapter.{method.name}"
        raise ModelError(
            sentence(place, expected="parameters that no method trains", found="none", remedy="install it once")
        )
    return chosen


def _biases(modules: Mapping[str, nn.Module], settings: Settings) -> list[tuple[str, str]]:
    held = [(path, "bias") for path, module in modules.items() if _has(module, "bias")]
    patterns = settings.biases or ("*",)
    return [(path, name) for path, name in held if any(fnmatchcase(f"{canonical(path)}.bias", p) for p in patterns)]


def _norms(modules: Mapping[str, nn.Module], _: Settings) -> list[tuple[str, str]]:
    return [(path, name) for path in norms(modules) for name in ("weight", "bias") if _has(modules[path], name)]


def _has(module: nn.Module, name: str) -> bool:
    return isinstance(module._parameters.get(name), torch.Tensor)


_BY_METHOD = {"bitfit": _biases, "layer_norm": _norms}
"""What each method that adds nothing trains of the base."""

_NOTHING = {
    "bitfit": lambda base: sentence(
        "adapter.bitfit",
        expected="a base with biases that the settings name",
        found=f"none in {base}",
        remedy="choose ln_tuning or ssf, which train what it has, or name other biases",
    ),
    "visual_prompt": lambda base: sentence(
        "adapter.visual_prompt",
        expected="a base that reads images patch by patch",
        found=base,
        remedy="choose prompt_tuning for a base of texts",
    ),
    "layer_norm": lambda base: sentence(
        "adapter.layer_norm",
        expected="a base with norms",
        found=f"none in {base}",
        remedy="choose ssf, which trains what it has",
    ),
}
"""What is said of a base that has nothing that the method trains."""
